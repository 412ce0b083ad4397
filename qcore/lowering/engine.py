"""Lowering by an engine that compiles subgraphs: a vendor's compiler, or a runtime such as ONNX Runtime.

The engine says which nodes of a reference model it can take, and compiles a subgraph of such nodes. All else is done
here: the largest subgraphs are found, each becomes one call in a graph that keeps the guards of the reference model,
and the plan learns what the engine computes.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore.fx.graph_module import (
    QGraphModule,
    get_attribute,
    is_persistent,
    place_for,
    set_tensor,
    submodule,
    tensors_of,
)
from qcore.fx.inplace import LASTING
from qcore.fx.nodes import new_node
from qcore.fx.operators import GETITEM, is_tuple, operator_of
from qcore.fx.record import record_of
from qcore.fx.shapes import Example
from qcore.lowering.assemble import assembled
from qcore.lowering.lowered import Lowered

#: What a compiled subgraph is: a function of its input tensors that gives its output tensors, in order.
Compiled = Callable[..., Sequence[Tensor]]
Compiler = Callable[[QGraphModule, tuple[Example, ...]], Compiled]


#: For how many shapes of its inputs what was compiled is kept; then the oldest goes.
MAX_SHAPES = 16

#: The tensors of a subgraph and their versions, and what was compiled of them for each shape of the inputs.
_Made = tuple[Sequence[Tensor], Sequence[Any], dict[Any, Compiled]]
_NOTHING_MADE: _Made = ((), (), {})


class EngineCall(nn.Module):
    """A subgraph that an engine computes.

    Its state is that of the subgraph: plain tensors. What the engine compiled of it is never copied or saved; it is
    made when it is first needed, and again when the state changes or inputs of other shapes come.

    Args:
        subgraph: takes and gives tensors.
        compiler: a function of a module, so that it can be pickled; gets the subgraph, and the shape and dtype of each
            input.
        name: of the engine, for ``explain``.
    """

    def __init__(self, subgraph: QGraphModule, compiler: Compiler, name: str) -> None:
        super().__init__()
        self.subgraph = subgraph
        self.compiler = compiler
        self.kernel_name = name
        self._made = _NOTHING_MADE

    def forward(self, *inputs: Tensor) -> Any:
        """What the subgraph gives: a tensor, or a tuple of several."""
        tensors = tensors_of(self.subgraph)
        # Nobody counts the writes into tensors of inference mode.
        versions = [object() if tensor.is_inference() else tensor._version for tensor in tensors]
        made = self._made
        is_known = len(made[0]) == len(tensors) and all(map(is_, made[0], tensors)) and made[1] == versions
        if not is_known:
            made = self._made = tensors, versions, {}  # With the tensors, lest others get their identities.
        compiled = made[2]
        key = tuple(Example(tuple(x.shape), x.dtype) for x in inputs)
        run = compiled.get(key)
        if run is None:
            run = compiled[key] = self.compiler(self.subgraph, key)
            if len(compiled) > MAX_SHAPES:
                compiled.pop(next(iter(compiled)), None)
        with torch.no_grad():
            results = tuple(run(*inputs))
        return results if len(results) != 1 else results[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": _NOTHING_MADE}


def lower_with_engine(
    reference: QGraphModule, takes: Callable[[fx.Node], bool], compiler: Compiler, *, name: str
) -> Lowered:
    """Let an engine compute all that it can take of a reference model.

    Args:
        reference: a reference model with its record; it isn't changed.
        takes: whether the engine can compute a node. It is asked only about nodes that make one tensor of tensors:
            operators in normal form (``qcore.fx.operators.operator_of``), ``qcore::quantize_per_tensor`` and its like
            (``qcore.ops``), and whatever else the model calls. Shapes and dtypes are in ``node.meta["example"]``.
        compiler: makes a function of a subgraph, see :class:`EngineCall`.
        name: of the engine, for ``explain``.

    Returns:
        The lowered graph, with the decisions that the engine computes. It is run once beside the reference model.
    """
    record = record_of(reference)
    assert record is not None
    levels = _levels(reference.graph, _offered(takes))
    regions = _regions(levels, {name for decision in record.plan.quantized for name in decision.nodes})
    graph, modules = _outer_graph(reference, levels, regions, compiler, name)
    where = {node.name: region for region in regions for node in region.nodes}
    kernels, declined = {}, {}
    for decision in record.plan.quantized:
        nodes = [n for n in decision.nodes if n not in record.plan.absorbed]
        if len({id(where.get(n)) for n in nodes}) == 1 and nodes[0] in where:
            kernels[decision.node] = name
        else:
            declined[decision.node] = f"{name} doesn't take it: float between dequantize and quantize"
    return Lowered(assembled(reference, graph, modules), kernels, declined)


#: The level of each node but attributes, and whether the engine takes it.
_Levels = dict[fx.Node, tuple[int, bool]]


@dataclass(eq=False)
class _Region:
    """Nodes that one call of the engine computes.

    Attributes:
        nodes: in the order of execution.
    """

    nodes: list[fx.Node] = field(default_factory=list)

    def inputs(self) -> list[fx.Node]:
        """What it reads of the graph around it, but for attributes."""
        inside = set(self.nodes)
        read = dict.fromkeys(source for node in self.nodes for source in node.all_input_nodes)
        return [source for source in read if source not in inside and source.op != "get_attr"]

    def outputs(self) -> list[fx.Node]:
        """What of it is read around it."""
        inside = set(self.nodes)
        return [node for node in self.nodes if not inside.issuperset(node.users)]


def _regions(levels: _Levels, planned: set[str]) -> list[_Region]:
    """The largest sets of nodes that can each be one call: those of one level."""
    found: dict[int, _Region] = {}
    for node, (level, is_taken) in levels.items():
        if is_taken:
            found.setdefault(level, _Region()).nodes.append(node)
    # To leave torch for nothing that the plan quantizes isn't worth it.
    return [region for region in found.values() if any(node.name in planned for node in region.nodes)]


def _levels(graph: fx.Graph, takes: Callable[[fx.Node], bool]) -> _Levels:
    """The level of each node: that of its sources, and one more where the engine begins or ends to take what is read.

    So nodes of one level never wait for each other by way of another level, whatever the graph is.
    """
    levels: _Levels = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        is_taken = node.op.startswith("call") and takes(node)
        before = [levels[source] for source in node.all_input_nodes if source in levels]
        levels[node] = max((level + (was is not is_taken) for level, was in before), default=int(is_taken)), is_taken
    return levels


def _offered(takes: Callable[[fx.Node], bool]) -> Callable[[fx.Node], bool]:
    """``takes`` for nodes that it may be asked about, and with the pieces of a tuple as one with it: it can't cross."""

    def is_taken(node: fx.Node) -> bool:
        split = node.all_input_nodes[0] if operator_of(node) is GETITEM else node
        if is_tuple(split):
            return all(map(_reads_tensors, (split, *split.users))) and all(map(takes, (split, *split.users)))
        return _is_tensor(node) and _reads_tensors(node) and takes(node)

    return is_taken


def _reads_tensors(node: fx.Node) -> bool:
    return all(_is_tensor(source) or is_tuple(source) for source in node.all_input_nodes)


def _is_tensor(node: fx.Node) -> bool:
    return "example" in node.meta


def _outer_graph(
    reference: QGraphModule, levels: _Levels, regions: Sequence[_Region], compiler: Compiler, name: str
) -> tuple[fx.Graph, dict[fx.Node, nn.Module]]:
    """The graph around the regions, and the modules that it calls for them."""
    region_of = {node: region for region in regions for node in region.nodes}
    last = len(levels) + 1
    places = {"placeholder": -2, "get_attr": -1, "output": last + 1}

    def position(node: fx.Node) -> int:
        # Inputs are written after all that reads them.
        return last if node.target in LASTING else places.get(node.op, levels.get(node, (0, False))[0])

    order = sorted(reference.graph.nodes, key=position)  # A stable sort.
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    modules: dict[fx.Node, nn.Module] = {}
    done: set[_Region] = set()
    for node in order:
        region = region_of.get(node)
        if region is None:
            if node.op != "get_attr" or not all(user in region_of for user in node.users):
                made[node] = graph.node_copy(node, made.__getitem__)
        elif region not in done:
            done.add(region)
            outputs = region.outputs()
            call = new_node(graph, "call_module", name, tuple(made[source] for source in region.inputs()))
            modules[call] = EngineCall(_subgraph(reference, region), compiler, name)
            for place, output in enumerate(outputs):
                single = len(outputs) == 1
                made[output] = call if single else new_node(graph, "call_function", getitem, (call, place), output.name)
    graph.set_codegen(copy.deepcopy(reference.graph._codegen))
    return graph, modules


def _subgraph(reference: QGraphModule, region: _Region) -> QGraphModule:
    """A region as a graph with the tensors and modules that it reads."""
    graph, root = fx.Graph(), nn.Module()
    made: dict[fx.Node, fx.Node] = {}
    for source in region.inputs():
        made[source] = graph.placeholder(source.name)
        made[source].meta.update(source.meta)
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in made:
                made[source] = graph.node_copy(source)
                target = str(source.target)
                value = get_attribute(reference, target)
                with torch.inference_mode(False):  # Writes into the state must be counted.
                    value = value.clone() if value.is_inference() else value
                set_tensor(root, target, value, is_persistent(reference, target))
        if node.op == "call_module":
            owner, _, last = str(node.target).rpartition(".")
            place_for(root, owner)._modules[last] = submodule(reference, str(node.target))
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in region.outputs()))
    return QGraphModule.of(root, graph)
