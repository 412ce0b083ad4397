"""How gradients pass a graph with integers in it: forwards for the calls that need them, made of a copy of the graph.

A rounding has no gradient that would be of use, and autograd knows none of integers. Left alone, it takes them for
constants, in silence: the gradient of ``x + linear(x)`` would be that of ``x``.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from qcore import ops
from qcore.fx.callers import needing_gradient, without_gradient
from qcore.fx.graph_module import QGraphModule
from qcore.fx.nodes import copied_graph, new_node
from qcore.fx.record import record_of


def straight_through(module: QGraphModule) -> Callable[..., Any]:
    """A reference model's forward in which a gradient passes each rounding as if it weren't there.

    Where a value is cut off because no integer stands for it, its gradient is 0, as in torch's fake quantization.

    Args:
        module: the model; it isn't changed.
    """
    graph = copied_graph(module.graph)
    for node in list(graph.nodes):
        if node.target is not ops.dequantize_per_tensor or node.args[0].target is not ops.quantize_per_tensor:
            continue
        value, scale, zero_point, low, high, _ = node.args[0].args
        with graph.inserting_after(node):
            passed = new_node(graph, "call_function", ops.straight_through, (node, value, scale, zero_point, low, high))
        node.replace_all_uses_with(passed, delete_user_cb=lambda user, passed=passed: user is not passed)
    return _forward(module, graph)


def refusing(module: QGraphModule) -> Callable[..., Any]:
    """A converted model's forward in which ``backward()`` raises an error where it comes to a kernel.

    What needs a gradient may come out of a kernel as integers, of which autograd knows nothing; so a second value goes
    beside them, the tensor that needs it.

    Args:
        module: the model; it isn't changed.
    """
    graph, record = copied_graph(module.graph), record_of(module)
    native = frozenset[str]() if record is None else record.native
    beside: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        reads = [beside[source] for source in node.all_input_nodes if source in beside]
        is_kernel = node.op == "call_module" and node.target in native
        if node.op == "output" or not (is_kernel or reads):
            continue
        if not is_kernel and len(set(reads)) == 1:
            beside[node] = reads[0]
            continue
        sources = (*node.all_input_nodes, *reads) if is_kernel else tuple(reads)
        with graph.inserting_after(node):
            needing = new_node(graph, "call_function", needing_gradient, tuple(dict.fromkeys(sources)))
        beside[node] = needing
        if is_kernel:
            with graph.inserting_after(needing):
                result = new_node(graph, "call_function", without_gradient, (node, needing))
            node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
            beside[result] = needing
    return _forward(module, graph)


def _forward(module: QGraphModule, graph: fx.Graph) -> Callable[..., Any]:
    return type(QGraphModule.of(module, graph)).forward
