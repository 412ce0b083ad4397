"""The way of one traced part of a model to a prepared one: each pass in turn."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qcore.backend_config import BackendConfig
from qcore.fx.expand import expand
from qcore.fx.forms import MODULES
from qcore.fx.fuse import FusionPattern, fuse
from qcore.fx.graph_module import Preparation, QGraphModule, adopt, own_modules, own_tensors
from qcore.fx.hooks import notes_of_weights
from qcore.fx.names import give_way
from qcore.fx.observe import observe
from qcore.fx.parts import Part, Parts, plain_attributes
from qcore.fx.plan import Refusal, make_plan
from qcore.fx.resolve import Resolver
from qcore.fx.shapes import propagate_examples
from qcore.fx.tracer import Origin
from qcore.observer import ObserverBase
from qcore.qconfig import ObserverConstructor, ObserverTraits
from qcore.qconfig_mapping import object_type_name
from qcore.quantization_plan import Decision, QuantizationPlan


class Preparer:
    """Takes traced parts to prepared ones.

    Args:
        resolver: the mapping.
        traits: of every observer constructor in the mapping.
        backend: its name.
        patterns: what it fuses.
        kernels: its implementations of observers.
        config: its capability, or the user's own.
        is_custom_config: whether it is the user's own.
        preserved: names of attributes of the model that the user wants kept.

    Attributes:
        refusals: what was asked for and isn't accepted, of all parts so far.
        plans: of all parts so far, by path.
    """

    def __init__(
        self,
        resolver: Resolver,
        traits: dict[ObserverConstructor, ObserverTraits],
        backend: str,
        patterns: Sequence[FusionPattern],
        kernels: dict[type[ObserverBase], type[ObserverBase]],
        config: BackendConfig,
        is_custom_config: bool,
        preserved: Sequence[str],
    ) -> None:
        self.resolver = resolver
        self.traits = traits
        self.backend = backend
        self.patterns = patterns
        self.kernels = kernels
        self.config = config
        self.is_custom_config = is_custom_config
        self.preserved = tuple(preserved)
        self.name = config.name or backend
        self.refusals: list[Refusal] = []
        self.plans: dict[str, QuantizationPlan] = {}

    @property
    def quantizes_anything(self) -> bool:
        """Whether any part so far has something on integers."""
        return any(plan.quantized for plan in self.plans.values())

    def prepare(self, part: Part) -> QGraphModule:
        """The part with observers in it; its graph becomes the result's."""
        graph = part.graph
        before = set(graph.graph.nodes)
        memo: dict[int, Any] = {}
        # What the user reads of the module is never rewritten: the passes get names of their own.
        plain = plain_attributes(part.module) if part.path else {}
        preserved = (*plain, *part.kept) if part.path else self.preserved
        give_way(graph, preserved)
        if not part.path:  # A part of a model that stays Python shares what is a copy already.
            own_modules(graph, part.module, memo)
        expand(graph)
        fuse(graph, self.patterns)
        if any(node not in before and node.op.startswith("call_") for node in graph.graph.nodes):
            propagate_examples(graph, part.examples)
        if not part.path:
            own_tensors(graph, part.module, memo)
        for name in preserved:
            adopt(graph, part.module, name, None if part.path else memo)
        plan, refusals = make_plan(graph, self.resolver, self.traits, self.backend, self.config)
        plan = replace(plan, notes=notes_of_weights(part.module))
        self.refusals.extend(refusals)
        self.plans[part.path] = plan
        plan = observe(graph, plan, self.kernels)
        graph.train(part.module.training)
        names = part.signature.tensor_names
        preparation = Preparation(
            "prepared", plan, self.backend, self.config, self.is_custom_config, preserved, part.path,
            owner=type(part.module).__name__,
            inputs=tuple((name, example.dtype) for name, example in zip(names, part.examples, strict=True)),
        )  # fmt: skip
        return graph.with_preparation(preparation)

    def decide_python(self, found: Parts) -> tuple[Decision, ...]:
        """Decide for what is called by modules that stay Python: float, each for its reason."""
        decisions = []
        for call in found.python_calls:
            origin = call.origin
            resolution = self.resolver.resolve(origin)
            if resolution.rule and resolution.qconfig is None:
                reason = f"rule {resolution.rule} says float"
            elif call.is_leaf and origin.object_type not in MODULES:
                reason = f"{self.name} has no pattern for it"
            else:
                reason = f"it stays Python: {call.reason or 'it is called by what stays Python'}"
            node, name = origin.path.replace(".", "_"), object_type_name(origin.object_type)
            decision = Decision(
                node, (node,), (name,), origin.path, False, resolution.rule, resolution.qconfig, reason=reason,
                weights=call.weights,
            )  # fmt: skip
            decisions.append(decision)
            if resolution.qconfig is not None:
                self.refusals.append(Refusal(decision, resolution.is_specific))
        called = {call.origin.path for call in found.python_calls}
        for module in found.python:
            if module.path in called:
                continue
            owner = module.path.rpartition(".")[0]
            kind = type(found.model.get_submodule(module.path))
            resolution = self.resolver.resolve(Origin(kind, True, module.path, owner, None, 0))
            if resolution.qconfig is not None:
                reason = f"it stays Python: {module.reason}"
                names = (module.path, (module.path,), (module.type_name,), module.path or module.type_name)
                self.refusals.append(Refusal(Decision(*names, False, resolution.rule, reason=reason), False))
        return tuple(decisions)

    def broken_requests(self) -> list[Refusal]:
        """The refusals that count: of a rule that names more than an operator, only if it quantizes nothing at all."""
        kept = {decision.rule for plan in self.plans.values() for decision in plan.quantized}
        return [r for r in self.refusals if r.is_specific or r.decision.rule not in (*kept, "global")]


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Keep Python from looking for cycles: what a pass makes stays, and looking takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
