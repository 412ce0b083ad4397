"""Lowering by a table of rules: a kernel for each decision of the plan whose operators a rule names.

A backend's ``qcore_lower`` hook may do anything with a reference model. Most need only this: a table of
:class:`LoweringRule` (a pattern, and a function that builds a kernel), one module that makes the backend's tensors from
floats and one that goes back. Nothing is matched: the plan says which nodes are one operation, and the table has a rule
for their operators or not. Operators that only move elements (reshape, permute, concatenate ...) work on the integers
by themselves. What has no kernel stays the float operator that it is in the reference model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore import ops
from qcore.backend_config import Pattern
from qcore.errors import LoweringError
from qcore.fx.constraints import gives_float, reads_float
from qcore.fx.graph_module import QGraphModule, get_attribute, submodule
from qcore.fx.nodes import copied_graph, drop_unread, new_node
from qcore.fx.operators import PAD, Kind, activation_inputs, anchor_key, operator_of, pattern_keys
from qcore.fx.patterns import pattern_problems
from qcore.fx.record import Record, record_of
from qcore.lowering.assemble import assembled
from qcore.lowering.lowered import Lowered
from qcore.lowering.qparams import QParams, QuantizedWeight
from qcore.quantization_plan import Decision

#: In place of a kernel's name.
_AS_THEY_ARE = "integers as they are"

#: The scale and the zero point of a value, as the nodes that all who write or read it have in common.
_Key = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class QuantizedCall:
    """What one decision computes on integers; what a rule's ``build`` gets.

    Attributes:
        nodes: the chain in the reference graph, in the order of execution; ``nodes[0]`` may have weights.
        inputs: the qparams of what it reads as activations, in order; the kernel is called with those values.
        weights: those of the first operator, in order.
        biases: of the same number; float32, or ``None``.
        output: the qparams of the result; ``None`` if the kernel must give float.
        overwritable: for each input, whether nothing reads its integers after this call, so that a kernel may write its
            result over them.
        keeps_qparams: whether the plan gives the result the qparams of all inputs. (Others may be equal by chance,
            which says nothing of the next state that is loaded.)
        dynamic: if the kernel is called with floats, and finds the qparams of what the first operator reads itself: the
            range of the integers.
        sources: the nodes among the arguments of the chain that stand for the inputs, in the same order.
        computed: arguments of the chain that the graph computes, such as sizes; the kernel gets them after the inputs.
        modules: what each node of the chain calls, where that is a module of a class that the pattern names.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[QParams, ...]
    weights: tuple[QuantizedWeight, ...] = ()
    biases: tuple[Tensor | None, ...] = ()
    output: QParams | None = None
    overwritable: tuple[bool, ...] = ()
    keeps_qparams: bool = False
    dynamic: tuple[int, int] | None = None
    sources: tuple[fx.Node, ...] = ()
    computed: tuple[fx.Node, ...] = ()
    modules: tuple[nn.Module | None, ...] = ()

    @property
    def module(self) -> nn.Module | None:
        """The module that the first node calls, if it calls one."""
        return self.modules[0] if self.modules else None

    @property
    def weight(self) -> QuantizedWeight:
        """The weight, for rules of operators that have one."""
        (weight,) = self.weights
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of that operator."""
        (bias,) = self.biases
        return bias

    @property
    def quantized_output(self) -> QParams:
        """The qparams of the result, for rules of operators whose dtype configs know no float output."""
        assert self.output is not None
        return self.output

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the first operator, in the order of its normal form."""
        return self.nodes[0].args


@dataclass(frozen=True)
class Declined:
    """A rule's answer when its kernel can't take a call.

    Attributes:
        reason: why, for ``explain``.
    """

    reason: str


@dataclass(frozen=True)
class LoweringRule:
    """A chain of operators, and the kernel that computes it.

    Attributes:
        pattern: as in a BackendPatternConfig.
        build: gives a module that takes the inputs' integers and returns the result's, or declines.
        is_dynamic: whether it is for operators whose input takes its qparams at run time: the module takes and gives
            float.
        takes_computed: whether the kernel may get sizes that the graph computes, after the inputs.
    """

    pattern: Pattern
    build: Callable[[QuantizedCall], "nn.Module | Declined"]
    is_dynamic: bool = False
    takes_computed: bool = False


BoundaryBuilder = Callable[[QParams], nn.Module]


def lower_with_rules(
    reference: QGraphModule,
    rules: Sequence[LoweringRule],
    *,
    enter: BoundaryBuilder,
    leave: BoundaryBuilder,
    graph_class: type[QGraphModule] = QGraphModule,
) -> Lowered:
    """Replace all that the rules take by kernels.

    Args:
        reference: a reference model with its record; it isn't changed.
        rules: of several for the same operators, the first that doesn't decline is taken.
        enter: gives the module that makes the backend's quantized tensor from a float tensor.
        leave: gives the module that goes back.
        graph_class: of the result; a library of kernels may run its graphs in a way of its own.

    Returns:
        The lowered graph, the names of the kernels, and the reasons where there are none.

    Raises:
        LoweringError: a rule's pattern can't be, or what it builds is no module.
    """
    lowering = _Lowering(reference, rules, enter, leave)
    return Lowered(lowering.run(graph_class), lowering.kernels, lowering.declined, reference)


class _Table:
    """Rules by the operators that they are for."""

    def __init__(self, rules: Sequence[LoweringRule]) -> None:
        problems = [problem for rule in rules for problem in pattern_problems(rule.pattern)]
        if problems:
            raise LoweringError(f"the rules can't be meant so: {'; '.join(problems)}")
        self._rules: dict[tuple[Any, ...], list[LoweringRule]] = {}
        for rule in rules:
            self._rules.setdefault((rule.is_dynamic, *pattern_keys(rule.pattern)), []).append(rule)

    def build(self, call: QuantizedCall, keys: tuple[object, ...]) -> "nn.Module | Declined":
        """The kernel for a call of these operators."""
        declined = Declined("")
        for rule in self._rules.get((call.dynamic is not None, *keys), ()):
            if call.computed and not rule.takes_computed:
                built: nn.Module | Declined = Declined("an argument is computed in the graph")
            else:
                built = rule.build(call)
            if not isinstance(built, Declined):
                return built
            declined = declined if declined.reason else built
        return declined


class _Lowering:
    def __init__(
        self, reference: QGraphModule, rules: Sequence[LoweringRule], enter: BoundaryBuilder, leave: BoundaryBuilder
    ) -> None:
        record = record_of(reference)
        assert record is not None
        self.reference = reference
        self.record: Record = record
        self.table = _Table(rules)
        self.enter, self.leave = enter, leave
        self.graph = copied_graph(reference.graph)
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.module_types = {
            str(node.target): type(submodule(reference, str(node.target)))
            for node in self.graph.nodes
            if node.op == "call_module"
        }
        self.position = {node: number for number, node in enumerate(self.graph.nodes)}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.moved: dict[fx.Node, tuple[fx.Node, _Key]] = {}
        self.kernels: dict[str, str] = {}
        self.declined: dict[str, str] = {}

    def run(self, graph_class: type[QGraphModule]) -> QGraphModule:
        for decision in self.record.plan.quantized:
            self.lower(decision)
        for node, (moved, _) in self.moved.items():
            if not moved.users:  # Who takes its parts out reads them as floats.
                del self.kernels[node.name]
                self.declined[node.name] = _in_float(Declined(""))
        for node in self.graph.nodes:
            if _reads_shape(node):
                node.args = fx.map_arg(node.args, lambda n: found[0] if (found := self.integers(n)) else n)
        drop_unread(self.graph)
        self.cross_boundaries()
        drop_unread(self.graph)
        return assembled(self.reference, self.graph, self.modules, graph_class)

    def integers(self, value: fx.Node) -> tuple[fx.Node, _Key] | None:
        """The node that gives a value as integers, and what tells its qparams; ``None`` if it is float only."""
        if value.target is ops.dequantize_per_tensor and not _is_attribute(value.args[0]):
            return _node(value.args[0]), _key(value)
        return self.moved.get(value)

    def lower(self, decision: Decision) -> None:
        """Let a kernel stand for what a decision computes, and for the quantize after it if the plan has one there."""
        config, result = decision.dtype_config, self.nodes[decision.node]
        assert config is not None
        chain = [self.nodes[name] for name in decision.nodes if name not in self.record.plan.absorbed]
        is_dynamic = chain[0].name in self.record.plan.dynamic
        if reads_float(config) and not is_dynamic:
            return  # Only its weight is quantized.
        own = () if gives_float(config) else result.users  # Else whoever reads the float quantizes it.
        quantize = next((user for user in own if user.target is ops.quantize_per_tensor), None)
        call, given = self.call(chain, quantize)
        reads_integers = len(given) == len(call.sources)
        keys = tuple(anchor_key(node, self.module_types) for node in chain)
        built = self.table.build(call, keys) if reads_integers else Declined("it reads floats")
        if not isinstance(built, Declined):
            self.kernels[decision.node] = getattr(built, "kernel_name", type(built).__name__)
            replaced = result if quantize is None else quantize
            with self.graph.inserting_before(replaced):
                kernel = self.add_module(chain[0].name, built, (*given, *call.computed))
            replaced.replace_all_uses_with(kernel)
        elif len(chain) == 1 and self.move(chain[0], quantize):
            self.kernels[decision.node] = _AS_THEY_ARE
        else:
            self.declined[decision.node] = _in_float(built, is_dynamic)

    def call(self, chain: Sequence[fx.Node], quantize: fx.Node | None) -> tuple[QuantizedCall, list[fx.Node]]:
        """What a chain computes on integers, and the nodes that give those; fewer than it reads if some are floats."""
        anchor = chain[0]
        weights, biases, own = self.weights(anchor)
        sources = [s for node in chain for s in activation_inputs(node) if s not in chain]
        own.update(sources, chain)
        computed = tuple(dict.fromkeys(s for node in chain for s in node.all_input_nodes if s not in own))
        call = QuantizedCall(
            nodes=tuple(chain),
            inputs=(),
            weights=weights,
            biases=biases,
            dynamic=self.record.plan.dynamic.get(anchor.name),
            sources=tuple(sources),
            computed=computed,
            modules=tuple(submodule(self.reference, str(n.target)) if n.op == "call_module" else None for n in chain),
        )
        if call.dynamic is not None:
            rounded = ops.dynamic_quantize_dequantize
            return call, [_node(source.args[0]) if source.target is rounded else source for source in sources]
        found = [integers for source in sources if (integers := self.integers(source)) is not None]
        call = replace(
            call,
            inputs=tuple(self.qparams(key) for _, key in found),
            output=None if quantize is None else self.unclamped(quantize)[1],
            overwritable=tuple(self.is_overwritable(node, found, chain[-1]) for node, _ in found),
            keeps_qparams=quantize is not None and all(key == _key(quantize) for _, key in found),
        )
        return call, [node for node, _ in found]

    def is_overwritable(self, integers: fx.Node, inputs: Sequence[tuple[fx.Node, _Key]], last: fx.Node) -> bool:
        """Whether ``integers`` are a kernel's own result that nothing reads after ``last``."""
        if integers.op != "call_module" and integers.target is not ops.quantize_per_tensor:
            return False  # A view of something else.
        if sum(node is integers for node, _ in inputs) != 1:
            return False
        readers = [r for user in integers.users for r in (user.users if self.integers(user) is not None else (user,))]
        # A node that isn't of the original graph is a kernel, made for an earlier decision, or moves the integers.
        return all(
            self.position.get(reader, -1 if reader.op == "call_module" else len(self.position)) <= self.position[last]
            for reader in readers
        )

    def weights(self, node: fx.Node) -> tuple[tuple[QuantizedWeight, ...], tuple[Tensor | None, ...], set[fx.Node]]:
        """The integer weights and the biases of an operator, and the nodes that give them."""
        op = operator_of(node)
        weights, biases, nodes = [], [], set[fx.Node]()
        for place, bias_place in zip(op.weights, op.biases, strict=True) if op is not None else ():
            dequantize, bias = _node(node.args[place]), node.args[bias_place]
            values, scale, zero_point = (self.tensor(argument) for argument in dequantize.args[:3])
            axis = int(dequantize.args[3]) if dequantize.target is ops.dequantize_per_channel else None  # type: ignore[arg-type]
            weights.append(QuantizedWeight(values, scale, zero_point, axis))
            biases.append(None if bias is None else self.tensor(bias))
            nodes.update((dequantize, *([bias] if isinstance(bias, fx.Node) else [])))
        return tuple(weights), tuple(biases), nodes

    def tensor(self, node: Any) -> Tensor:
        found = get_attribute(self.reference, str(node.target))
        assert isinstance(found, Tensor)
        return found.detach()

    def unclamped(self, quantize: fx.Node) -> tuple[fx.Node, QParams]:
        """What a quantize reads, before the clamps that the plan leaves to it; and its qparams, with their bounds."""
        value, clamps, qparams = _node(quantize.args[0]), [], self.qparams(_key(quantize))
        while value.name in self.record.plan.absorbed:
            clamps.append(value)
            value = _node(value.args[0])
        for clamp in reversed(clamps):
            qparams = qparams.clamped(*clamp.args[1:3])  # type: ignore[arg-type]
        return value, qparams

    @cached_property
    def ranges(self) -> dict[_Key, tuple[int, int, torch.dtype]]:
        """The range and the dtype of the integers of each set of qparams: what its quantize makes."""
        return {_key(n): n.args[3:6] for n in self.position if n.target is ops.quantize_per_tensor}

    def qparams(self, key: _Key) -> QParams:
        scale, zero_point = map(self.tensor, key)
        return QParams(float(scale), int(zero_point), *self.ranges[key])

    def move(self, node: fx.Node, quantize: fx.Node | None) -> bool:
        """Let an operator that only moves elements work on integers, and say whether it does."""
        op = operator_of(node)
        # Zeros around integers would be other numbers than zero.
        if op is None or op.kind is not Kind.MOVE or (op is PAD and node.args[2] == "constant"):
            return False
        inputs = {source: self.integers(source) for source in activation_inputs(node)}
        keys = {found[1] if found is not None else None for found in inputs.values()}
        if len(keys) != 1 or None in keys or (quantize is not None and _key(quantize) not in keys):
            return False
        args = fx.map_arg(node.args, lambda n: found[0] if (found := inputs.get(n)) is not None else n)
        with self.graph.inserting_after(node):
            moved = new_node(self.graph, "call_function", op.function, args)
        if quantize is None:  # The getitems that take its parts out follow.
            self.moved[node] = moved, next(iter(keys))  # type: ignore[assignment]
        else:
            quantize.replace_all_uses_with(moved)
        return True

    def cross_boundaries(self) -> None:
        """Turn what is left of quantize and dequantize into the backend's modules."""
        made: dict[object, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.target is ops.quantize_per_tensor:
                value, qparams = self.unclamped(node)
                module, args = self.enter(qparams), (value,)
            elif node.target is ops.dequantize_per_tensor and not _is_attribute(node.args[0]):
                module, args = self.leave(self.qparams(_key(node))), node.args[:1]
            else:
                continue
            same = (node.target, node.args[0], _key(node))
            if same not in made:
                with self.graph.inserting_before(node):
                    made[same] = self.add_module(node.name, module, args)
            node.replace_all_uses_with(made[same])

    def add_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """A node that calls a module of the backend's; at which name it stands is settled when all else has its own."""
        if not isinstance(module, nn.Module):
            raise LoweringError(f"what is to compute node {name!r} is {module!r}, neither a module nor Declined")
        node = new_node(self.graph, "call_module", name, args)
        self.modules[node] = module
        return node


def _in_float(declined: Declined, is_dynamic: bool = False) -> str:
    """What ``explain`` says of a decision that has no kernel."""
    how = "rounded at run time, computed in float" if is_dynamic else "float between dequantize and quantize"
    return f"no kernel{f' ({declined.reason})' if declined.reason else ''}: {how}"


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _is_attribute(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node asks for something that a tensor's integers know as well as its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _key(node: fx.Node) -> _Key:
    """The scale and the zero point of a quantize or dequantize."""
    return _node(node.args[1]), _node(node.args[2])
