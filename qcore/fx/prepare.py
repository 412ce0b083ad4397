"""The way of one traced part of a model to a prepared one: each pass in turn."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qcore.backend_config import BackendConfig
from qcore.fx.expand import expand
from qcore.fx.fuse import FusionPattern, fuse
from qcore.fx.graph_module import Preparation, QGraphModule, adopt, own_modules, own_tensors
from qcore.fx.names import give_way
from qcore.fx.observe import observe
from qcore.fx.parts import Part, plain_attributes
from qcore.fx.plan import Refusal, make_plan
from qcore.fx.resolve import Resolver
from qcore.fx.shapes import propagate_examples
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
