"""The last step of a lowering: the module has what its graph reads, and a kernel takes nobody's name."""

import torch
from torch import fx, nn

from qcore.fx.graph_module import QGraphModule
from qcore.lowering.assemble import assembled


def reference():
    """A graph that reads a layer's bias, calls a module within another, and has a name ``kernel`` of the user's."""
    root = nn.Module()
    root.layer = nn.Linear(2, 2)
    root.layer.register_buffer("unsaved", torch.ones(2), persistent=False)
    root.inner = nn.Sequential(nn.ReLU())
    root.kernel = nn.Parameter(torch.full((2,), 5.0))
    root.unread = nn.Parameter(torch.ones(1))
    graph = fx.Graph()
    x = graph.placeholder("x")
    bias, unsaved, kernel = (graph.get_attr(name) for name in ("layer.bias", "layer.unsaved", "kernel"))
    total = graph.call_function(torch.add, (graph.call_module("inner.0", (x,)), bias))
    graph.output(graph.call_function(torch.add, (graph.call_function(torch.mul, (total, unsaved)), kernel)))
    return QGraphModule.of(root, graph)


class Doubles(nn.Module):
    def forward(self, x):
        return x * 2


def lowered():
    """The graph of such a model after a kernel was put behind it, twice, and another one dropped again."""
    graph = reference().graph
    output = next(reversed(graph.nodes))
    with graph.inserting_before(output):
        kernel = graph.create_node("call_module", "kernel", (output.args[0],))
        second = graph.create_node("call_module", "kernel", (kernel,))
        gone = graph.create_node("call_module", "gone", (kernel,))
    output.args = (second,)
    graph.erase_node(gone)
    return graph, {kernel: Doubles(), second: Doubles(), gone: Doubles()}


def test_a_module_has_what_its_graph_reads_and_no_more():
    wanted, x = reference(), torch.randn(3, 2)
    expected = wanted(x)
    graph, modules = lowered()
    module = assembled(wanted, graph, modules)
    assert torch.equal(module(x), 4 * expected)
    assert module.layer.bias is wanted.layer.bias and module.get_submodule("inner.0") is wanted.get_submodule("inner.0")
    assert list(module.state_dict()) == ["kernel", "layer.bias"] and module.layer.unsaved is wanted.layer.unsaved
    assert not hasattr(module, "unread") and not hasattr(module, "gone")


def test_kernels_take_free_names_and_leave_the_user_s_where_it_is():
    wanted = reference()
    module = assembled(wanted, *lowered())
    assert module.kernel is wanted.kernel
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    assert names == ["inner.0", "kernel_1", "kernel_2"]
    assert all(type(module.get_submodule(name)) is Doubles for name in names[1:])


def test_the_result_is_of_the_class_that_runs_it():
    class Own(QGraphModule):
        pass

    wanted = reference()
    assert isinstance(assembled(wanted, *lowered(), Own), Own)
