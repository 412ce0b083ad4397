"""Lowering by a table of rules: replaces dequantize -> operator -> quantize in a reference model by kernels.

A backend's ``qcore_lower`` hook may do anything with a reference model. Most need only this: a table of
:class:`LoweringRule` (a pattern, and a function that builds a kernel), one module that makes the backend's tensors from
floats and one that goes back. Operators that only move elements (reshape, permute, concatenate ...) then work on the
integers by themselves. What no rule takes stays the float operator that it is in the reference model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore import ops
from qcore.backend_config import Pattern
from qcore.errors import LoweringError
from qcore.fx.graph_module import QGraphModule, adopt, get_attribute, is_persistent, place_for, set_tensor, submodule
from qcore.fx.names import free_target, qparams_targets
from qcore.fx.nodes import copied_graph, drop_unread, new_node
from qcore.fx.operators import (
    CHUNK,
    PAD,
    SPLIT,
    Kind,
    Operator,
    activation_inputs,
    operator_named,
    operator_of,
    pattern_keys,
)
from qcore.fx.patterns import pattern_problems
from qcore.kernel import KernelModule, PadKernel, QParams, QuantizedWeight

#: In place of a kernel's name.
_AS_THEY_ARE = "integers as they are"


@dataclass(frozen=True)
class QuantizedCall:
    """One place where a rule fits; what a rule's ``build`` gets.

    Attributes:
        nodes: the chain in the reference graph, in the order of execution; ``nodes[0]`` may have a weight.
        inputs: the qparams of what it reads as activations, in order; the kernel is called with those values.
        weight: the weight of the first operator.
        bias: the bias of the first operator, float32.
        output: the qparams of the result; ``None`` if the kernel must give float.
        overwritable: for each input, whether nothing reads its integers after this call, so that a kernel may write its
            result over them.
        keeps_qparams: whether the plan gives the result the qparams of all inputs. (Others may be equal by chance,
            which says nothing of the next state that is loaded.)
        dynamic: if the kernel is called with a float and finds its qparams itself: the range of the integers.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[QParams, ...]
    weight: QuantizedWeight | None
    bias: Tensor | None
    output: QParams | None
    overwritable: tuple[bool, ...]
    keeps_qparams: bool = False
    dynamic: tuple[int, int] | None = None

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
            float. Such a pattern is a single operator.
    """

    pattern: Pattern
    build: Callable[[QuantizedCall], "nn.Module | Declined"]
    is_dynamic: bool = False


class FloatKernel(nn.Module):
    """Any operator, computed in float within one module: dequantizes its inputs and quantizes its result.

    For operators whose cost doesn't matter much, or that a backend has no better kernel for.

    Args:
        call: the place; a chain of several operators isn't taken.
        enter: makes the backend's tensor from a float tensor.
        leave: goes back.
    """

    kernel_name = "float within the kernel"
    replayable = True

    def __init__(
        self, call: QuantizedCall, enter: "Callable[[QParams], nn.Module]", leave: "Callable[[QParams], nn.Module]"
    ) -> None:
        super().__init__()
        (node,) = call.nodes
        op = operator_of(node)
        assert op is not None
        self.operator = op.name
        numbers = {source: number for number, source in enumerate(dict.fromkeys(activation_inputs(node)))}
        # Positions among the inputs take the place of the nodes; the inputs come in the order in which they are read.
        order = [numbers[source] for source in activation_inputs(node)]
        self.places: tuple[Any, ...] = tuple(fx.node.map_aggregate(node.args, lambda a: _placed(a, numbers)))
        self.order = tuple(order)
        self.leave = nn.ModuleList(leave(qparams) for qparams in call.inputs)
        self.enter = enter(call.quantized_output)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The operator's result on the inputs' integers."""
        values = {n: leave(x) for n, leave, x in zip(self.order, self.leave, inputs, strict=True)}
        args = fx.node.map_aggregate(self.places, lambda a: values[a.number] if isinstance(a, _Place) else a)
        result: Tensor = self.enter(operator_named(self.operator).function(*args))
        return result

    @staticmethod
    def rule(operator: Operator, enter: "BoundaryBuilder", leave: "BoundaryBuilder") -> "LoweringRule":
        """The rule that computes ``operator`` this way; it declines where a size is computed in the graph."""

        def build(call: QuantizedCall) -> "nn.Module | Declined":
            sources = set(activation_inputs(call.nodes[0]))
            if any(argument not in sources for argument in call.nodes[0].all_input_nodes):
                return Declined("an argument is computed in the graph")
            return FloatKernel(call, enter, leave)

        return LoweringRule(operator, build)


@dataclass(frozen=True)
class _Place:
    """Stands for an input among the arguments of a :class:`FloatKernel`."""

    number: int


def _placed(argument: Any, numbers: dict[fx.Node, int]) -> Any:
    return _Place(numbers[argument]) if isinstance(argument, fx.Node) else argument


BoundaryBuilder = Callable[[QParams], nn.Module]


def lower_with_rules(
    reference: QGraphModule, rules: Sequence[LoweringRule], *, enter: BoundaryBuilder, leave: BoundaryBuilder
) -> QGraphModule:
    """Replace all that the rules take by kernels.

    Args:
        reference: a reference model with its plan; it isn't changed. Only operators that the plan quantizes are
            replaced.
        rules: tried longest pattern first; of equal length, in order.
        enter: gives the module that makes the backend's quantized tensor from a float tensor.
        leave: gives the module that goes back.

    Returns:
        The lowered model; its plan names the kernels, and the reasons where there are none.

    Raises:
        LoweringError: a rule's pattern can't be, or what it builds is no module.
    """
    return _Lowering(reference, rules, enter, leave).run()


@dataclass(frozen=True)
class _Integers:
    """A value of the graph as integers: the node that gives them, and the node names of their qparams."""

    node: fx.Node
    key: tuple[str, str]


class _Lowering:
    def __init__(
        self, reference: QGraphModule, rules: Sequence[LoweringRule], enter: BoundaryBuilder, leave: BoundaryBuilder
    ) -> None:
        preparation = reference.preparation
        assert preparation is not None
        self.reference = reference
        self.preparation = preparation
        self.enter, self.leave = enter, leave
        self.graph = copied_graph(reference.graph)
        self.modules: dict[fx.Node, nn.Module] = {}
        self.numbers = {qparams_targets(name): number for number, name in preparation.plan.observers.items()}
        self.integers: dict[fx.Node, _Integers] = {}
        self.padded: dict[fx.Node, tuple[str, str]] = {}
        self.kernels: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self.planned = {name for decision in preparation.plan.quantized for name in decision.nodes}
        self.float_results = {
            decision.node
            for decision in preparation.plan.quantized
            if decision.dtype_config is not None and decision.dtype_config.output_constraints.dtype == torch.float32
        }
        self.by_last: dict[object, list[tuple[tuple[object, ...], LoweringRule]]] = {}
        self.dynamic_rules = {pattern_keys(rule.pattern)[0]: rule for rule in rules if rule.is_dynamic}
        problems = [problem for rule in rules for problem in pattern_problems(rule.pattern)]
        if problems:
            raise LoweringError(f"the rules can't be meant so: {'; '.join(problems)}")
        for rule in rules:
            if rule.is_dynamic:
                continue
            keys = pattern_keys(rule.pattern)
            self.by_last.setdefault(keys[-1], []).append((keys, rule))
        for candidates in self.by_last.values():
            candidates.sort(key=lambda item: -len(item[0]))

    def run(self) -> QGraphModule:
        nodes = list(self.graph.nodes)
        self.position = {node: number for number, node in enumerate(nodes)}
        dynamic = self.preparation.plan.dynamic
        for node in nodes:
            if node.target is ops.dequantize_per_tensor and not _is_attribute(node.args[0]):
                self.integers[node] = _Integers(_node(node.args[0]), _key(node))
            elif node.target is ops.quantize_per_tensor:
                self.lower_quantize(node)
            elif node.name in dynamic:
                self.lower_dynamic(node)
            elif node.name in self.float_results:
                self.lower_chain(node, None)
            elif _reads_shape(node):
                node.args = fx.map_arg(node.args, lambda n: self.integers[n].node if n in self.integers else n)
            else:
                self.move(node)
        drop_unread(self.graph)
        self.cross_boundaries()
        drop_unread(self.graph)
        module = QGraphModule.of(nn.Module(), self.graph, is_raw=True)
        for name in self.preparation.preserved:
            adopt(module, self.reference, name)
        self.take_attributes(module)
        self.name_modules(module)
        with torch.inference_mode(False):
            counter = torch.empty(0)
        for kernel in module.modules():
            if isinstance(kernel, KernelModule):
                kernel.share_counter(counter)
        plan = self.preparation.plan.with_kernels(self.kernels, self.declined)
        module.train(self.reference.training)
        return module.with_preparation(self.preparation.at("converted", plan))

    def lower_chain(self, value: fx.Node, quantize: fx.Node | None) -> bool:
        """Let a kernel stand for the chain that ends in ``value``, and of the quantize after it if there is any."""
        for keys, rule in self.by_last.get(operator_of(value) or value.target, ()):
            chain = self.chain(value, keys)
            if chain is None:
                continue
            call, sources = self.call(chain, quantize)
            built = rule.build(call)
            if isinstance(built, Declined):
                self.declined[chain[0].name] = f"no kernel ({built.reason}): float between dequantize and quantize"
                continue
            self.declined.pop(chain[0].name, None)
            self.kernels[chain[0].name] = getattr(built, "kernel_name", type(built).__name__)
            replaced = value if quantize is None else quantize
            with self.graph.inserting_before(replaced):
                kernel = self.add_module(chain[0].name, built, tuple(sources))
            replaced.replace_all_uses_with(kernel)
            return True
        return False

    def lower_dynamic(self, node: fx.Node) -> None:
        """Let a kernel that finds its input's qparams itself stand for an operator and the rounding before it."""
        op = operator_of(node)
        rule = self.dynamic_rules.get(op)
        (rounded,) = activation_inputs(node)
        if op is None or rule is None or rounded.target is not ops.dynamic_quantize_dequantize:
            self.declined[node.name] = "no kernel: rounded at run time, computed in float"
            return
        weight, bias = self.weight(node, op) if op.weight is not None else (None, None)
        low, high = rounded.args[1:]
        call = QuantizedCall((node,), (), weight, bias, None, (), dynamic=(int(low), int(high)))  # type: ignore[arg-type]
        built = rule.build(call)
        if isinstance(built, Declined):
            self.declined[node.name] = f"no kernel ({built.reason}): rounded at run time, computed in float"
            return
        self.kernels[node.name] = getattr(built, "kernel_name", type(built).__name__)
        with self.graph.inserting_before(node):
            kernel = self.add_module(node.name, built, (rounded.args[0],))
        node.replace_all_uses_with(kernel)

    def lower_quantize(self, quantize: fx.Node) -> None:
        """Find what computes the integers of a quantize: a kernel, or the integers as they are."""
        value, _ = self.unclamped(quantize)
        if self.lower_chain(value, quantize):
            return
        moved = self.integers.get(value)
        if moved is not None and moved.key == _key(quantize) and value is quantize.args[0]:
            quantize.replace_all_uses_with(moved.node)
            self.kernels.setdefault(value.name, _AS_THEY_ARE)
        elif value.name in self.planned and value.name not in self.declined:
            self.declined[value.name] = "no kernel: float between dequantize and quantize"

    def chain(self, value: fx.Node, keys: tuple[object, ...]) -> list[fx.Node] | None:
        """The nodes of a pattern that ends in ``value``, whose other inputs are all integers."""
        nodes = [value]
        if value.name not in self.planned or (len(value.users) != 1 and value.name not in self.float_results):
            return None
        for key in reversed(keys[:-1]):
            found = [
                source
                for source in activation_inputs(nodes[0])
                if (operator_of(source) or source.target) == key
                and len(source.users) == 1
                and source.name in self.planned
            ]
            if len(found) != 1:
                return None
            nodes.insert(0, found[0])
        op = operator_of(nodes[0])
        if op is not None and op.weight is not None:
            weight = nodes[0].args[op.weight]
            if not isinstance(weight, fx.Node) or weight.target not in (
                ops.dequantize_per_channel,
                ops.dequantize_per_tensor,
            ):
                return None
        sources = [s for node in nodes for s in activation_inputs(node) if s not in nodes]
        return nodes if all(source in self.integers for source in sources) else None

    def call(self, chain: list[fx.Node], quantize: fx.Node | None) -> tuple[QuantizedCall, list[fx.Node]]:
        sources = [s for node in chain for s in activation_inputs(node) if s not in chain]
        values = [self.integers[source] for source in sources]
        op = operator_of(chain[0])
        weight, bias = (None, None) if op is None or op.weight is None else self.weight(chain[0], op)
        call = QuantizedCall(
            nodes=tuple(chain),
            inputs=tuple(self.qparams_by_key(value.key) for value in values),
            weight=weight,
            bias=bias,
            output=None if quantize is None else self.unclamped(quantize)[1],
            overwritable=tuple(self.is_overwritable(value.node, sources, chain[-1]) for value in values),
            keeps_qparams=quantize is not None and all(value.key == _key(quantize) for value in values),
        )
        return call, [value.node for value in values]

    def is_overwritable(self, integers: fx.Node, sources: list[fx.Node], last: fx.Node) -> bool:
        """Whether ``integers`` are a kernel's own result that nothing reads after ``last``."""
        if integers.op != "call_module" and integers.target is not ops.quantize_per_tensor:
            return False  # A view of something else.
        if sum(self.integers[source].node is integers for source in sources) != 1:
            return False
        readers = [reader for user in integers.users for reader in (user.users if user in self.integers else (user,))]
        # A node that isn't of the original graph is a kernel, made for an earlier quantize, or moves the integers.
        return all(
            self.position.get(reader, -1 if reader.op == "call_module" else len(self.position)) <= self.position[last]
            for reader in readers
        )

    def weight(self, node: fx.Node, op: Operator) -> tuple[QuantizedWeight, Tensor | None]:
        assert op.weight is not None and op.bias is not None
        dequantize = _node(node.args[op.weight])
        values, scale, zero_point = (self.tensor(argument) for argument in dequantize.args[:3])
        axis = int(dequantize.args[3]) if dequantize.target is ops.dequantize_per_channel else None  # type: ignore[arg-type]
        bias = node.args[op.bias]
        return QuantizedWeight(values, scale, zero_point, axis), None if bias is None else self.tensor(bias)

    def tensor(self, node: Any) -> Tensor:
        found = get_attribute(self.reference, str(node.target))
        assert isinstance(found, Tensor)
        return found.detach()

    def unclamped(self, quantize: fx.Node) -> tuple[fx.Node, QParams]:
        """What a quantize reads, before the clamps that the plan leaves to it; and its qparams, with their bounds."""
        read, scale, zero_point, low, high, dtype = quantize.args
        qparams = QParams(float(self.tensor(scale)), int(self.tensor(zero_point)), low, high, dtype)  # type: ignore[arg-type]
        value, clamps = _node(read), []
        while value.name in self.preparation.plan.absorbed:
            clamps.append(value)
            value = _node(value.args[0])
        for clamp in reversed(clamps):
            qparams = qparams.clamped(*clamp.args[1:3])  # type: ignore[arg-type]
        return value, qparams

    def qparams_by_key(self, key: tuple[str, str]) -> QParams:
        """The qparams of integers; the range doesn't matter to those who read them."""
        scale = float(get_attribute(self.reference, key[0]))
        zero_point = get_attribute(self.reference, key[1])
        tensor = self.preparation.plan.tensors[self.numbers[key]]
        return QParams(scale, int(zero_point), tensor.quant_min, tensor.quant_max, tensor.traits.dtype)

    def move(self, node: fx.Node) -> None:
        """Let an operator that only moves elements work on integers."""
        op = operator_of(node)
        if op is None or op.kind is not Kind.MOVE or node.name not in self.planned:
            return
        sources = activation_inputs(node)
        if not sources or any(source not in self.integers for source in sources):
            return
        values = [self.integers[source] for source in sources]
        if any(value.key != values[0].key for value in values):
            return
        integer_of = {source: value.node for source, value in zip(sources, values, strict=True)}
        args = fx.map_arg(node.args, lambda argument: integer_of.get(argument, argument))
        with self.graph.inserting_after(node):
            moved = new_node(self.graph, "call_function", op.function, args)
        if op is PAD and node.args[2] == "constant":
            self.padded[moved] = values[0].key
        self.integers[node] = _Integers(moved, values[0].key)
        if op in (CHUNK, SPLIT):  # No quantize follows, only the getitems that take its parts out.
            self.kernels.setdefault(node.name, _AS_THEY_ARE)

    def cross_boundaries(self) -> None:
        """Turn what is left of quantize and dequantize into the backend's modules, and padding of integers."""
        made: dict[object, fx.Node] = {}
        for node in list(self.graph.nodes):
            identity: object = node
            if node.target is ops.quantize_per_tensor:
                value, qparams = self.unclamped(node)
                module, args = self.enter(qparams), (value,)
                identity = (node.target, node.args[0], _key(node))
            elif node.target is ops.dequantize_per_tensor and not _is_attribute(node.args[0]):
                module, args = self.leave(self.qparams_by_key(_key(node))), node.args[:1]
                identity = (node.target, node.args[0], _key(node))
            elif node in self.padded:
                module, args = PadKernel(self.qparams_by_key(self.padded[node])), node.args[:2]
            else:
                continue
            if identity not in made:
                with self.graph.inserting_before(node):
                    made[identity] = self.add_module(node.name, module, args)
            node.replace_all_uses_with(made[identity])

    def add_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """A node that calls a module of the backend's; at which name it stands is settled when all else has its own."""
        if not isinstance(module, nn.Module):
            raise LoweringError(f"what is to compute node {name!r} is {module!r}, neither a module nor Declined")
        node = new_node(self.graph, "call_module", name, args)
        self.modules[node] = module
        return node

    def take_attributes(self, module: QGraphModule) -> None:
        """Take what is left of the reference model; modules first, since a tensor may be one of theirs."""
        for node in self.graph.nodes:
            if node.op == "call_module" and node not in self.modules:
                owner, _, name = str(node.target).rpartition(".")
                place_for(module, owner)._modules[name] = submodule(self.reference, str(node.target))
        for node in self.graph.nodes:
            if node.op == "get_attr":
                target = str(node.target)
                set_tensor(module, target, get_attribute(self.reference, target), is_persistent(self.reference, target))

    def name_modules(self, module: QGraphModule) -> None:
        """Put the backend's modules at names that are free: their nodes', if nothing of the user's is called that."""
        for node in self.graph.nodes:
            if node in self.modules:
                node.target = free_target(str(node.target), module)
                module._modules[node.target] = self.modules[node]


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


def _key(node: fx.Node) -> tuple[str, str]:
    """The names of the scale and the zero point of a quantize or dequantize."""
    return str(_node(node.args[1]).target), str(_node(node.args[2]).target)
