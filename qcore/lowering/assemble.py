"""The last step of any lowering: a graph that calls a backend's modules, as a module with all that it needs."""

from collections.abc import Mapping

from torch import fx, nn

from qcore.fx.graph_module import QGraphModule, adopt, get_attribute, is_persistent, place_for, set_tensor, submodule
from qcore.fx.names import free_target
from qcore.fx.record import record_of


def assembled(
    reference: QGraphModule,
    graph: fx.Graph,
    modules: Mapping[fx.Node, nn.Module],
    graph_class: type[QGraphModule] = QGraphModule,
) -> QGraphModule:
    """A module that runs ``graph``.

    Args:
        reference: has the tensors and modules that the graph goes on reading, and the attributes to preserve.
        graph: becomes the module's own.
        modules: the backend's, by the nodes that call them; they get the names of their nodes, if nothing of the user's
            is called so.
        graph_class: of the result.
    """
    module = graph_class.of(nn.Module(), graph, is_raw=True)
    record = record_of(reference)
    for name in record.preserved if record is not None else ():
        adopt(module, reference, name)
    # Modules first, since a tensor may be one of theirs.
    for node in graph.nodes:
        if node.op == "call_module" and node not in modules:
            owner, _, name = str(node.target).rpartition(".")
            place_for(module, owner)._modules[name] = submodule(reference, str(node.target))
    for node in graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            set_tensor(module, target, get_attribute(reference, target), is_persistent(reference, target))
    for node, inner in modules.items():
        if node.graph is graph and not node._erased:
            node.target = free_target(str(node.target), module)
            module._modules[node.target] = inner
    return module
