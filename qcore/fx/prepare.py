"""The way of one traced part of a model to a prepared one: each pass in turn."""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from qcore.fx.effects import keeps_no_state
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule, adopt, own_tensors, submodule, with_record
from qcore.fx.hooks import notes_of_weights
from qcore.fx.observe import observe
from qcore.fx.operators import MODULES
from qcore.fx.parts import NO_PYTHON, Part, Parts, scripts_in
from qcore.fx.patterns import module_classes
from qcore.fx.plan import Refusal, make_plan
from qcore.fx.record import Record, Settings
from qcore.fx.resolve import Resolver
from qcore.fx.runs import comparable
from qcore.fx.tracer import HARMLESS, Origin
from qcore.fx.twin import Copies, twin_of
from qcore.fx.verify import check_observed, check_planned, check_traced, rewrite
from qcore.observer import StandIns
from qcore.qconfig import ObserverConstructor, ObserverTraits
from qcore.qconfig_mapping import object_type_name
from qcore.quantization_plan import Decision, QuantizationPlan


class Preparer:
    """Takes traced parts to prepared ones.

    Args:
        resolver: the mapping.
        traits: of every observer constructor in the mapping.
        settings: what is settled for all parts.
        patterns: what the backend fuses.
        stand_ins: its implementations of observers.
        copies: of tensors of the model, for the results to have.

    Attributes:
        refusals: what was asked for and isn't accepted, of all parts so far.
        plans: of all parts so far, by path.
    """

    def __init__(
        self,
        resolver: Resolver,
        traits: dict[ObserverConstructor, ObserverTraits],
        settings: Settings,
        patterns: Sequence[FusionPattern],
        stand_ins: StandIns,
        copies: Copies,
    ) -> None:
        self.resolver = resolver
        self.traits = traits
        self.settings = settings
        self.patterns = patterns
        self.stand_ins = stand_ins
        self.name = settings.backend_config.name or settings.backend
        self.copies = copies
        self.refusals: list[Refusal] = []
        self.plans: dict[str, QuantizationPlan] = {}

    @property
    def quantizes_anything(self) -> bool:
        """Whether any part so far has something on integers."""
        return any(plan.quantized for plan in self.plans.values())

    def prepare(self, part: Part) -> QGraphModule:
        """The part with observers in it; its graph becomes the result's.

        Raises:
            GraphError: a pass left a graph that isn't sound.
        """
        check_traced(part.graph)
        # What the user reads of the module is never rewritten: the passes get names of their own.
        preserved = tuple(part.attributes)
        with comparable():
            graph, notes = rewrite(part, self.patterns, preserved)
        graph.meta.pop(HARMLESS, None)
        own_tensors(graph, part.root, self.copies)
        leaves = _leaves_as_new(graph, part, self.copies)
        for name in preserved:
            adopt(graph, part.module, name, lambda value: twin_of(value, self.copies, leaves))
        settings = self.settings
        plan, refusals = make_plan(graph, self.resolver, self.traits, settings.backend, settings.backend_config)
        check_planned(graph, plan)
        self.refusals.extend(refusals)
        self.plans[part.path] = plan
        observers = observe(graph, plan, self.stand_ins)
        check_observed(graph, plan, observers)
        graph.train(part.module.training)
        scripts = [f"{path} stays as it is: {NO_PYTHON}" for path in scripts_in(graph)]
        names = part.signature.tensor_names
        record = Record(
            "prepared", settings, plan, preserved, type(part.module).__name__,
            tuple((name, example.dtype) for name, example in zip(names, part.examples, strict=True)),
            observers, (*notes_of_weights(part.module), *notes, *scripts),
        )  # fmt: skip
        return with_record(graph, record)

    def idle(self, found: Parts) -> dict[str, QuantizationPlan]:
        """The plans of parts in which nothing is quantized: where a model stays Python, they stay what they were."""
        return {path: plan for path, plan in self.plans.items() if not plan.quantized} if found.python else {}

    def plan_around(self, model: nn.Module, found: Parts) -> QuantizationPlan:
        """What is decided outside of the graphs: all of it stays float."""
        idle = [decision for plan in self.idle(found).values() for decision in plan.decisions]
        return QuantizationPlan(
            self.settings.backend, (*idle, *self.decide_python(model, found)), python=found.python,
            other_weights=found.other_weights,
        )  # fmt: skip

    def decide_python(self, model: nn.Module, found: Parts) -> tuple[Decision, ...]:
        """Decide for what is called by modules that stay Python: float, each for its reason."""
        decisions = []
        known = {*MODULES, *module_classes(self.settings.backend_config)}
        for call in found.python_calls:
            origin = call.origin
            resolution = self.resolver.resolve(origin)
            if resolution.rule and resolution.qconfig is None:
                reason = f"rule {resolution.rule} says float"
            elif call.is_leaf and origin.object_type not in known:
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
            kind = type(submodule(model, module.path))
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


def _leaves_as_new(graph: QGraphModule, part: Part, copies: Copies) -> dict[int, Any]:
    """Copy anew what is kept whole and may have changed when it was called; gives the copy of each such module."""
    found: dict[int, Any] = {}
    for node in graph.graph.nodes:
        origin = node.meta.get("origin")
        if node.op != "call_module" or not isinstance(origin, Origin):
            continue
        path = str(node.target)
        original = submodule(part.module, origin.path.removeprefix(part.path).removeprefix("."))
        if not keeps_no_state(submodule(graph, path)) and id(original) not in found:
            owner, _, name = path.rpartition(".")
            submodule(graph, owner)._modules[name] = twin_of(original, copies)
        found[id(original)] = submodule(graph, path)
    return found


class _Collector:
    """The garbage collector is the process's: it is off as long as any thread wants it to be."""

    lock = threading.Lock()
    count = 0
    was_enabled = False


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Keep Python from looking for cycles: what a pass makes stays, and looking takes a fifth of the time."""
    with _Collector.lock:
        if _Collector.count == 0:
            _Collector.was_enabled = gc.isenabled()
            gc.disable()
        _Collector.count += 1
    try:
        yield
    finally:
        with _Collector.lock:
            _Collector.count -= 1
            if _Collector.count == 0 and _Collector.was_enabled:
                gc.enable()
