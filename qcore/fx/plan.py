"""The pass that decides: reads the mapping (request) and the BackendConfig (capability), writes a plan (answer).

For every match of a backend's pattern: does a rule ask for it to be quantized, does a dtype config accept the qconfig,
are its inputs and its output float32 tensors? Then for every value between two operators: whose observer watches it,
and which range of integers can all take that write and read it? Nothing is changed here, and no later pass decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from qcore.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig, ObservationType
from qcore.dtypes import dtype_name
from qcore.fx.constraints import bounds_within, constrained, gives_float, reads_float, scale_bounds, violation
from qcore.fx.costs import multiply_adds, weight_count
from qcore.fx.graph_module import submodule
from qcore.fx.hooks import hook_of
from qcore.fx.match import Match, find_matches
from qcore.fx.operators import CLAMP, GETITEM, Kind, has_weights, is_tuple, operator_of
from qcore.fx.resolve import Resolution, Resolver
from qcore.fx.shapes import is_float_tensor, is_floating_tensor
from qcore.fx.tracer import Origin
from qcore.qconfig import ObserverConstructor, ObserverTraits, QConfig
from qcore.qconfig_mapping import object_type_name
from qcore.quantization_plan import Decision, Observation, QParamsSpec, QuantizationPlan, WeightQuantization

#: Clamps that a reader knows by another name.
_CLAMPS: dict[tuple[object, ...], str] = {(0, None): "relu", (0, 6): "relu6"}


@dataclass(frozen=True)
class Refusal:
    """A qconfig that was asked for and that the backend doesn't accept.

    Attributes:
        decision: the decision to stay float.
        is_specific: whether the rule names this operator or its module; one that names more (a container, a regex) is
            broken only if nothing that it speaks of is quantized.
    """

    decision: Decision
    is_specific: bool = True


def make_plan(
    traced: fx.GraphModule,
    resolver: Resolver,
    traits: dict[ObserverConstructor, ObserverTraits],
    backend_name: str,
    backend_config: BackendConfig,
) -> tuple[QuantizationPlan, list[Refusal]]:
    """Decide for every operator of ``traced``.

    Args:
        traced: in normal form, fused, with examples.
        resolver: the mapping.
        traits: the traits of every observer constructor in the mapping.
        backend_name: for the plan.
        backend_config: the capability.

    Returns:
        The plan, and what the user asked for and doesn't get.
    """
    return _Planner(traced, resolver, traits, backend_name, backend_config).run()


class _Assigned:
    """Which value of the graph has which qparams; sets of qparams merge when an operator wants its inputs alike."""

    def __init__(self) -> None:
        self.specs: list[QParamsSpec] = []
        self._merged: list[int] = []
        self.outputs: dict[fx.Node, int] = {}
        self.observed: dict[fx.Node, int] = {}
        self.inputs: dict[tuple[fx.Node, ObserverConstructor], int] = {}
        self.input_readers: dict[tuple[fx.Node, ObserverConstructor], list[str]] = {}

    def new(self, spec: QParamsSpec) -> int:
        self.specs.append(spec)
        self._merged.append(len(self._merged))
        return len(self.specs) - 1

    def find(self, number: int) -> int:
        while self._merged[number] != number:
            self._merged[number] = self._merged[self._merged[number]]
            number = self._merged[number]
        return number

    def of(self, number: int) -> QParamsSpec:
        return self.specs[self.find(number)]

    def merge(self, first: int, second: int) -> None:
        first, second = self.find(first), self.find(second)
        if first == second:
            return
        kept, other = self.specs[first], self.specs[second]
        self.specs[first] = _intersected(kept, other.quant_min, other.quant_max, other.eps, other.scale_max)
        self._merged[second] = first

    def can_merge(self, numbers: list[int]) -> bool:
        specs = [self.of(number) for number in numbers]
        return all(s.constructor == specs[0].constructor and s.fixed == specs[0].fixed for s in specs)


def _intersected(spec: QParamsSpec, low: int, high: int, eps: float | None, scale_max: float | None) -> QParamsSpec:
    floors = [value for value in (spec.eps, eps) if value is not None]
    ceilings = [value for value in (spec.scale_max, scale_max) if value is not None]
    return replace(
        spec,
        quant_min=max(spec.quant_min, low),
        quant_max=min(spec.quant_max, high),
        eps=max(floors) if floors else None,
        scale_max=min(ceilings) if ceilings else None,
    )


class _Planner:
    def __init__(
        self,
        traced: fx.GraphModule,
        resolver: Resolver,
        traits: dict[ObserverConstructor, ObserverTraits],
        backend_name: str,
        backend_config: BackendConfig,
    ) -> None:
        self.traced = traced
        self.resolver = resolver
        self.traits = traits
        self.backend_name = backend_name
        self.config = backend_config
        self.name = backend_config.name or backend_name
        self.values = _Assigned()
        self.module_types: dict[str, type[nn.Module]] = {
            str(node.target): type(traced.get_submodule(str(node.target)))
            for node in traced.graph.nodes
            if node.op == "call_module"
        }
        self.match_of: dict[fx.Node, Match] = {}
        self.likely: dict[fx.Node, bool] = {}
        self.decisions: dict[fx.Node, Decision] = {}
        self.refusals: list[Refusal] = []
        self.weights: list[WeightQuantization] = []
        self.dynamic: dict[str, tuple[int, int]] = {}
        self.absorbed: dict[str, str] = {}

    def run(self) -> tuple[QuantizationPlan, list[Refusal]]:
        matches = find_matches(self.traced.graph, self.config, self.module_types, self.may_absorb, self.accepts_qconfig)
        self.match_of = {node: match for match in matches for node in match.nodes}
        self.guess(matches)
        for match in matches:
            if self.counts(match.result) or is_tuple(match.result):
                self.decide(match)
        for node in self.traced.graph.nodes:
            if node not in self.match_of and (self.counts(node) or self.is_asked_for(node)):
                self.leave_float(node)
        return self.plan(), self.refusals

    def resolution(self, node: fx.Node) -> Resolution:
        origin = node.meta.get("origin")
        return self.resolver.resolve(origin) if isinstance(origin, Origin) else Resolution("", None)

    def may_absorb(self, anchor: fx.Node, clamp: fx.Node) -> bool:
        """Unless a rule says that this very clamp stays float; a clamp that no rule names goes with its operator."""
        resolution = self.resolution(clamp)
        if self.resolution(anchor).qconfig is None:
            return resolution.qconfig is None  # What is asked for isn't lost with what stays float.
        return resolution.qconfig is not None or not resolution.rule

    def accepts_qconfig(self, anchor: fx.Node, config: BackendPatternConfig) -> bool:
        """Whether a pattern takes the qconfig that its first operator is asked to have."""
        qconfig = self.resolution(anchor).qconfig
        if qconfig is None:
            return True
        match = Match((anchor,), 0, config)
        return any(self.refusal(match, qconfig, dtype_config) is None for dtype_config in config.dtype_configs)

    @staticmethod
    def counts(node: fx.Node) -> bool:
        """Whether a node is an operator on float tensors, or a leaf module: a plan must give account of it."""
        if node.op not in ("call_function", "call_method") or not is_floating_tensor(node):
            return node.op == "call_module"
        if operator_of(node) is not GETITEM:
            return True
        # What takes a tensor out of the tuple that a leaf module gives computes nothing.
        return all(is_tuple(source) or "example" in source.meta for source in node.all_input_nodes[:1])

    def is_asked_for(self, node: fx.Node) -> bool:
        """Whether a rule names a call that is no operator of qcore's, whatever it gives."""
        if node.op not in ("call_function", "call_method") or operator_of(node) is not None:
            return False  # An operator's node without a float result does arithmetic on sizes.
        resolution = self.resolution(node)
        return resolution.is_specific and resolution.qconfig is not None

    def leave_float(self, node: fx.Node) -> None:
        resolution = self.resolution(node)
        hook = hook_of(submodule(self.traced, str(node.target))) if node.op == "call_module" else ""
        reason = f"it has {hook}, so it is called as it is" if hook else f"{self.name} has no pattern for it"
        if resolution.rule and resolution.qconfig is None:
            reason = f"rule {resolution.rule} says float"
        decision = self.decisions[node] = self.decision((node,), reason)
        if resolution.qconfig is not None:
            self.refusals.append(Refusal(decision, resolution.is_specific))

    def decision(self, nodes: Sequence[fx.Node], reason: str, **accepted: Any) -> Decision:
        """The decision about a chain: it stays float, unless something else is said."""
        anchor, resolution = nodes[0], self.resolution(nodes[0])
        return Decision(
            node=nodes[-1].name,
            nodes=tuple(node.name for node in nodes),
            operators=tuple(self.label(node) for node in nodes),
            path=self.path(anchor),
            rule=resolution.rule,
            qconfig=resolution.qconfig,
            reason=reason,
            multiply_adds=sum(multiply_adds(node, self.traced) for node in nodes),
            weights=weight_count(anchor, self.traced),
            **{"quantized": False, **accepted},
        )

    def label(self, node: fx.Node) -> str:
        op = operator_of(node)
        if op is CLAMP:
            written = object_type_name(node.meta["origin"].object_type) if "origin" in node.meta else ""
            return "hardtanh" if "hardtanh" in written.lower() else _CLAMPS.get(node.args[1:], op.name)
        if op is not None:
            return op.name
        return object_type_name(self.module_types.get(str(node.target), node.target))

    @staticmethod
    def path(node: fx.Node) -> str:
        origin = node.meta.get("origin")
        return origin.path if isinstance(origin, Origin) else ""

    def decide(self, match: Match) -> None:
        reason, breaks, accepted = self.judge(match, self.resolution(match.anchor))
        if accepted is not None and gives_float(accepted):  # No quantize follows that could do what the clamps do.
            match, clamps = match.without_absorbed()
            for clamp in clamps:
                self.decisions[clamp] = self.decision((clamp,), "its input is float, and it only hands on what it gets")
        condition = match.config.condition.name if match.config.condition else ""
        decision = self.decisions[match.result] = self.decision(
            match.nodes, reason, condition=condition, quantized=accepted is not None, dtype_config=accepted
        )
        if accepted is None:
            if breaks is not None:
                self.refusals.append(Refusal(decision, breaks))
            self.refuse_folded(match, decision)

    def refuse_folded(self, match: Match, decision: Decision) -> None:
        """Note what is asked of operators that were folded into one that stays float."""
        for origin in match.anchor.meta.get("folded", ()):
            resolution = self.resolver.resolve(origin)
            if resolution.is_specific and resolution.qconfig is not None:
                where = f"{decision.operators[0]} at {decision.path or decision.node}"
                folded = replace(
                    decision, operators=(object_type_name(origin.object_type),), path=origin.path, rule=resolution.rule,
                    reason=f"it is folded into {where}, which stays float: {decision.reason}",
                )  # fmt: skip
                self.refusals.append(Refusal(folded))

    def judge(self, match: Match, resolution: Resolution) -> tuple[str, bool | None, DTypeConfig | None]:
        """Why a match stays float, or the dtype config by which it doesn't.

        In between: ``None`` if staying float breaks no request, else :attr:`Refusal.is_specific`.
        """
        qconfig = resolution.qconfig
        if qconfig is None:
            asked = f"rule {resolution.rule} says float" if resolution.rule else "no rule asks for it"
            return asked, None, None
        tensors = [*match.inputs(), match.result]
        other = next((node for node in tensors if not is_float_tensor(node) and not is_tuple(node)), None)
        if other is not None:
            example = other.meta.get("example")
            breaks = resolution.is_specific if is_floating_tensor(other) else None
            return f"{other.name} is {dtype_name(example.dtype) if example else 'no tensor'}, not float32", breaks, None
        problem = self.weight_problem(match)
        if problem:
            return problem, resolution.is_specific, None
        if self.traits[qconfig.activation].is_placeholder and not has_weights(match.anchor):
            return "its qconfig is for operators with weights", resolution.is_specific, None
        if self.saves_nothing(match, resolution, qconfig):
            return "it has no weights, and integers wouldn't save a conversion here", None, None
        refusals: list[str] = []
        for dtype_config in match.config.dtype_configs:
            if gives_float(dtype_config) and not reads_float(dtype_config) and not self.may_give_float(match):
                continue
            refusal = self.refusal(match, qconfig, dtype_config) or self.reading_problem(match, dtype_config)
            if refusal is None:
                reason = self.place(match, qconfig, dtype_config)
                return (reason, None, None) if reason else ("", None, dtype_config)
            if refusal not in refusals:
                refusals.append(refusal)
        return f"{self.name} doesn't accept its qconfig: {'; '.join(refusals)}", True, None

    def weight_problem(self, match: Match) -> str:
        op = operator_of(match.anchor)
        weights = [match.anchor.args[place] for place in op.weights] if op is not None else []
        constant = all(isinstance(weight, fx.Node) and weight.op == "get_attr" for weight in weights)
        return "" if constant else "its weight is computed, not a parameter"

    def refusal(self, match: Match, qconfig: QConfig, dtype_config: DTypeConfig) -> str | None:
        """Why a dtype config doesn't accept a qconfig, or ``None`` if it does."""
        activation = self.traits[qconfig.activation]
        if bool(dtype_config.is_dynamic) != activation.is_dynamic:
            kind = "dynamic" if activation.is_dynamic else "static"
            return f"it offers no {kind} quantization here"
        if activation.is_placeholder and not reads_float(dtype_config):
            return f"a placeholder observer of {dtype_name(activation.dtype)} gives no static qparams"
        if not activation.is_placeholder and reads_float(dtype_config) and not dtype_config.is_dynamic:
            return "it offers weight-only quantization, for a placeholder observer of float32"
        if activation.qscheme.per_channel:
            return "activations per channel aren't offered"
        sides = [("input", dtype_config.input_constraints)]
        if not gives_float(dtype_config):
            sides.append(("output", dtype_config.output_constraints))
        for side, constraints in sides:
            shares = match.config.observation_type is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
            demanded = side == "output" and not shares
            problem = violation(side, activation, constraints, demanded)
            if problem:
                return problem
        op = operator_of(match.anchor)
        for place in op.biases if op is not None else ():
            bias = match.anchor.args[place]
            example = bias.meta.get("example") if isinstance(bias, fx.Node) else None
            if example is not None and dtype_config.bias_dtype not in (None, example.dtype):
                return f"bias dtype {dtype_name(example.dtype)}, it takes {dtype_name(dtype_config.bias_dtype)}"
        if has_weights(match.anchor):
            return violation("weight", self.traits[qconfig.weight], dtype_config.weight_constraints, True)
        return None

    def saves_nothing(self, match: Match, resolution: Resolution, qconfig: QConfig) -> bool:
        """Whether integers here only cost conversions: an operator without weights between float neighbours.

        Computed in float, its integer inputs are dequantized and its result quantized for whoever wants integers;
        computed in integers, its float inputs are quantized and its result dequantized for whoever wants floats. Where
        that comes to the same, it is float if an operator reads it as float: that saves a rounding.
        """
        inputs = set(match.inputs())
        if resolution.is_specific or operator_of(match.anchor) is None or has_weights(match.anchor):
            return False
        if match.config.observation_type is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT:
            return False  # It costs nothing on integers, and ``place`` refuses it on floats.
        integers = {node for node in inputs if node in self.values.outputs}
        also_integers = {node for node in inputs - integers if (node, qconfig.activation) in self.values.inputs}
        readers = list(match.result.users)
        wanting = [reader for reader in readers if self.wants_integers(reader)]
        in_float = len(integers) + bool(wanting)
        in_integers = len(inputs - integers - also_integers) + (len(wanting) < len(readers))
        if in_integers != in_float:
            return in_integers > in_float
        return not integers or any(reader not in wanting and reader.op != "output" for reader in readers)

    def wants_integers(self, reader: fx.Node) -> bool:
        """Whether a reader will probably be computed on integers; a guess, where it isn't decided upon yet."""
        match = self.match_of.get(reader)
        if match is None:
            return False
        op = operator_of(match.anchor)
        if op is not None and op.kind is Kind.MOVE:
            return any(self.wants_integers(user) for user in match.result.users)
        return self.likely.get(match.result, False)

    def guess(self, matches: Sequence[Match]) -> None:
        """Note for every match whether it will probably be computed on integers, before any is decided upon.

        An operator with weights will if it is asked for; one without, if all that it reads are integers; what only
        moves elements follows what it moves.
        """
        for match in matches:
            resolution = self.resolution(match.anchor)
            if resolution.qconfig is None:
                continue
            if self.traits[resolution.qconfig.activation].is_placeholder:
                continue  # It reads and gives float.
            if resolution.is_specific or has_weights(match.anchor):
                self.likely[match.result] = not self.weight_problem(match)
            else:
                self.likely[match.result] = all(self.likely.get(node, False) for node in match.inputs())

    def place(self, match: Match, qconfig: QConfig, dtype_config: DTypeConfig) -> str:
        """Give the match's inputs, output and weight their qparams; or say why it has to stay float."""
        inputs = list(dict.fromkeys(match.inputs()))
        known = [self.values.outputs[node] for node in inputs if node in self.values.outputs]
        shares = match.config.observation_type is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
        if shares and not known:
            return "its input is float, and it only hands on what it gets"
        if reads_float(dtype_config):
            if dtype_config.is_dynamic:
                bounds = bounds_within(self.traits[qconfig.activation], dtype_config.input_constraints)
                self.dynamic[match.anchor.name] = bounds
            self.place_weights(match, qconfig, dtype_config)
            return ""
        if len(known) < len(inputs) and self.traits[qconfig.activation].fixed:
            return "its input is float, and the fixed qparams of its qconfig are for its output"
        numbers = [self.read(node, match, qconfig, dtype_config) for node in inputs]
        if gives_float(dtype_config):
            pass  # Nothing quantizes the output, so there is nothing to observe.
        elif shares and self.values.can_merge(numbers):
            for number in numbers[1:]:
                self.values.merge(numbers[0], number)
            self.values.outputs[match.result] = numbers[0]
        else:
            output = self.values.new(self.output_spec(qconfig, dtype_config))
            self.values.outputs[match.result] = output
            self.values.observed[match.result] = output
            for clamp in match.nodes[len(match.nodes) - match.clamps :]:
                self.absorbed[clamp.name] = match.result.name
        self.place_weights(match, qconfig, dtype_config)
        return ""

    def place_weights(self, match: Match, qconfig: QConfig, dtype_config: DTypeConfig) -> None:
        op = operator_of(match.anchor)
        for place in op.weights if op is not None else ():
            spec = constrained(qconfig.weight, self.traits[qconfig.weight], dtype_config.weight_constraints)
            self.weights.append(WeightQuantization(match.anchor.name, place, spec))

    def may_give_float(self, match: Match) -> bool:
        """Whether a kernel may as well give float: nobody wants the result as integers, so a rounding is saved.

        A clamp needs the quantize after it to be absorbed.
        """
        return match.clamps == 0 and not any(self.wants_integers(user) for user in match.result.users)

    def reading_problem(self, match: Match, dtype_config: DTypeConfig) -> str | None:
        """What already settled about a value stands against reading it as a dtype config must, or ``None``."""
        for node in () if reads_float(dtype_config) else match.inputs():
            if node not in self.values.outputs:
                continue
            spec = self.values.of(self.values.outputs[node])
            traits = spec.traits
            if spec.fixed is not None or traits.has_explicit_range:
                traits = replace(traits, quant_min=spec.quant_min, quant_max=spec.quant_max, has_explicit_range=True)
            problem = violation("input", traits, dtype_config.input_constraints, False)
            if problem:
                return f"{node.name} is quantized otherwise than it must be read: {problem}"
        return None

    def read(self, node: fx.Node, match: Match, qconfig: QConfig, dtype_config: DTypeConfig) -> int:
        constraints = dtype_config.input_constraints
        if node in self.values.outputs:
            number = self.values.outputs[node]
        else:
            key = (node, qconfig.activation)
            if key not in self.values.inputs:
                spec = constrained(qconfig.activation, self.traits[qconfig.activation], constraints)
                self.values.inputs[key] = self.values.new(spec)
                self.values.input_readers[key] = []
            number = self.values.inputs[key]
            self.values.input_readers[key].extend(
                reader.name for reader in match.nodes if node in reader.all_input_nodes
            )
        root = self.values.find(number)
        spec = self.values.specs[root]
        low, high = bounds_within(spec.traits, constraints)
        self.values.specs[root] = _intersected(spec, low, high, *scale_bounds(constraints))
        return number

    def output_spec(self, qconfig: QConfig, dtype_config: DTypeConfig) -> QParamsSpec:
        return constrained(qconfig.activation, self.traits[qconfig.activation], dtype_config.output_constraints)

    def plan(self) -> QuantizationPlan:
        values = self.values
        numbering: dict[int, int] = {}

        def number(raw: int) -> int:
            return numbering.setdefault(values.find(raw), len(numbering))

        observations = [Observation(node.name, number(raw), readers) for node, raw, readers in self.in_graph_order()]
        shared = {
            node.name: number(raw)
            for node, raw in values.outputs.items()
            if node not in values.observed and not is_tuple(node)
        }
        specs = sorted(numbering, key=lambda raw: numbering[raw])
        order = {node: place for place, node in enumerate(self.traced.graph.nodes)}
        return QuantizationPlan(
            backend=self.backend_name,
            decisions=tuple(self.decisions[node] for node in sorted(self.decisions, key=lambda node: order[node])),
            qparams=tuple(values.specs[raw] for raw in specs),
            observations=tuple(observations),
            shared=shared,
            absorbed=self.absorbed,
            weights=tuple(self.weights),
            dynamic=self.dynamic,
        )

    def in_graph_order(self) -> Iterator[tuple[fx.Node, int, tuple[str, ...] | None]]:
        """Every observed value with its qparams and its readers."""
        inputs: dict[fx.Node, list[ObserverConstructor]] = {}
        for node, constructor in self.values.inputs:
            inputs.setdefault(node, []).append(constructor)
        for node in self.traced.graph.nodes:
            if node in self.values.observed:
                yield node, self.values.observed[node], None
            for constructor in inputs.get(node, ()):
                key = (node, constructor)
                yield node, self.values.inputs[key], tuple(self.values.input_readers[key])
