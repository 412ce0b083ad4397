"""What a graph refers to: at paths that code can read, as a copy where it may change."""

import torch
from torch import fx, nn

import qcore
from qcore.fx.graph_module import QGraphModule
from qcore.fx.roots import Root, Source
from qcore.fx.twin import Copies
from tests.models import prepared_for


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.n += 1
        return self.linear(x)


def test_a_module_that_is_kept_whole_starts_as_it_was():
    custom = qcore.PrepareCustomConfig().set_non_traceable_module_classes([Counts])
    model = nn.Sequential(nn.Linear(4, 4), Counts())
    prepared = prepared_for(model, (torch.randn(2, 4),), prepare_custom_config=custom)
    kept = prepared.get_submodule("1")
    assert (model[1].calls, kept.calls, float(model[1].n), float(kept.n)) == (0, 0, 0.0, 0.0)
    prepared(torch.randn(2, 4))
    assert (model[1].calls, kept.calls, float(model[1].n), float(kept.n)) == (0, 1, 0.0, 1.0)


class Names(nn.Module):
    """Names that a graph's code can't read, tensors that are shared, a buffer that isn't saved."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_parameter("code", self.layer.weight)
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.unread = nn.Linear(2, 2)


def rooted(model, *targets, constants=None, keeps_parameters=False, traced=None):
    graph = fx.Graph()
    for target in targets:
        if isinstance(target, tuple):
            graph.call_module(target[0], (graph.placeholder(f"x_{len(graph.nodes)}"),))
        else:
            graph.get_attr(target)
    graph.output(tuple(graph.nodes))
    source = Source(model, traced or model, Copies())
    root = Root(source, graph, constants or {}, keeps_parameters=keeps_parameters)
    return QGraphModule.of(root, graph), [node.target for node in graph.nodes if node.op == "get_attr"]


def test_a_root_holds_what_the_graph_refers_to_and_no_more():
    model = Names().eval()
    module, targets = rooted(model, "layer.weight", "code", "unsaved")
    assert targets == ["layer.weight", "code_1", "unsaved"]  # Every GraphModule has ``code``.
    assert module.layer.weight is module.code_1 is not model.layer.weight  # Shared as they were, and copies.
    assert torch.equal(module.code_1, model.layer.weight)
    assert list(module.state_dict()) == ["code_1", "layer.weight"] and "unsaved" in dict(module.named_buffers())
    assert not hasattr(module, "unread") and not module.training


def test_parameters_are_the_model_s_own_where_they_are_to_be_and_buffers_never():
    model = Names()
    module, _ = rooted(model, "layer.weight", "unsaved", keeps_parameters=True)
    assert module.layer.weight is model.layer.weight
    assert module.unsaved is not model.unsaved and torch.equal(module.unsaved, model.unsaved)


def test_what_came_to_be_while_it_ran_is_found_and_constants_are_the_graph_s():
    model, traced = Names(), Names()
    traced.register_buffer("late", torch.full((1,), 7.0))
    constant = torch.arange(3)
    module, _ = rooted(model, "late", "layer.bias", ".constant", constants={".constant": constant}, traced=traced)
    assert module.late == 7 and torch.equal(module.layer.bias, model.layer.bias)
    assert any(buffer is constant for buffer in module.buffers())


def test_a_leaf_is_one_copy_however_often_it_is_called_and_holds_its_tensors():
    model = nn.Sequential(Counts())
    module, _ = rooted(model, ("0",), ("0",), "0.n", "0.linear.weight")
    leaf = module.get_submodule("0")
    assert type(leaf) is Counts and leaf is not model[0]
    module(torch.randn(1, 4), torch.randn(1, 4))
    assert (leaf.calls, model[0].calls, float(leaf.n)) == (2, 0, 2.0)
    source = Source(model, model, Copies())
    assert source.leaf("0") is source.leaf("0") and source.home("0.n") is model


def test_a_leaf_with_a_hook_is_copied_with_what_the_hook_knows():
    model = nn.Sequential(nn.Linear(2, 2))
    model.seen = []
    model[0].register_forward_hook(lambda *_: model.seen.append(1))
    leaf = Source(model, model, Copies()).leaf("0")
    leaf(torch.randn(1, 2))
    assert model.seen == []
