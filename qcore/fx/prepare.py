"""The way of one traced part of a model to a prepared one: each pass in turn."""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from qcore.backend_config import BackendConfig
from qcore.fx.effects import keeps_no_state
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import Preparation, QGraphModule, own_tensors, submodule
from qcore.fx.observe import observe
from qcore.fx.parts import NO_PYTHON, Part, plain_attributes, scripts_in
from qcore.fx.plan import Refusal, make_plan
from qcore.fx.resolve import Resolver
from qcore.fx.runs import comparable
from qcore.fx.tracer import HARMLESS
from qcore.fx.twin import Copies, copied_value, twin_of
from qcore.fx.verify import rewrite
from qcore.observer import ObserverBase
from qcore.qconfig import ObserverConstructor, ObserverTraits
from qcore.quantization_plan import QuantizationPlan


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
        copies: of tensors of the model, for the results to have.

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
        copies: Copies,
    ) -> None:
        self.resolver = resolver
        self.traits = traits
        self.backend = backend
        self.patterns = patterns
        self.kernels = kernels
        self.config = config
        self.is_custom_config = is_custom_config
        self.preserved = tuple(preserved)
        self.copies = copies
        self.refusals: list[Refusal] = []
        self.plans: dict[str, QuantizationPlan] = {}

    @property
    def quantizes_anything(self) -> bool:
        """Whether any part so far has something on integers."""
        return any(plan.quantized for plan in self.plans.values())

    def prepare(self, part: Part) -> QGraphModule:
        """The part with observers in it; its graph becomes the result's."""
        with comparable():
            graph, notes = rewrite(part, self.patterns)
        graph.meta.pop(HARMLESS, None)
        own_tensors(graph, part.root, self.copies)
        _make_leaves_as_new(graph, part.root, self.copies)
        plan, refusals = make_plan(graph, self.resolver, self.traits, self.backend, self.config)
        self.refusals.extend(refusals)
        self.plans[part.path] = plan
        scripts = [f"{path} stays as it is: {NO_PYTHON}" for path in scripts_in(graph)]
        plan = replace(plan, notes=(*plan.notes, *notes, *scripts))
        plan = observe(graph, plan, self.kernels)
        graph.train(part.module.training)
        preserved = self.preserved
        if part.path:  # The model around it goes on reading what it read.
            attributes = plain_attributes(part.module)
            preserved = (*attributes, *part.kept)
            vars(graph).update(copied_value(attributes, self.copies))
        else:
            for name in preserved:
                setattr(graph, name, copied_value(getattr(part.module, name), self.copies))
        preparation = Preparation(
            "prepared", plan, self.backend, self.config, self.is_custom_config, preserved, part.path
        )
        return graph.with_preparation(preparation)


def _make_leaves_as_new(graph: QGraphModule, module: nn.Module, copies: Copies) -> None:
    """A module that is kept whole may have changed when it was called."""
    for path in dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "call_module"):
        if not keeps_no_state(submodule(graph, path)):
            owner, _, name = path.rpartition(".")
            submodule(graph, owner)._modules[name] = twin_of(submodule(module, path), copies)


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
