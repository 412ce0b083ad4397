"""Runs of the user's model that change nothing: not the model, not the random numbers that others draw.

What runs is a twin of the model (``twin.py``). A model that is known to do no more than its graph says runs freely; any
other is guarded (``guard.py``), and if it writes into its parameters, the run is repeated with copies of them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from qcore.fx.guard import guarded
from qcore.fx.patches import Patches
from qcore.fx.shapes import propagate_examples
from qcore.fx.thread_tracer import OPERATORS_ONLY
from qcore.fx.tracer import HARMLESS
from qcore.fx.twin import cloned, shared, twin_of, with_shared_parameters

T = TypeVar("T")


class Runs:
    """The runs of one preparation; each starts from the model as it is, and from the same random numbers.

    Args:
        model: isn't changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start = torch.random.get_rng_state()
        self._is_guarded = True
        self._writes_parameters = False

    def trust(self, graph: fx.GraphModule | None) -> None:
        """The model computes what a graph says; if that is known and harmless, its runs needn't be looked at."""
        self._is_guarded = graph is None or not graph.meta.pop(HARMLESS)

    def run(self, function: Callable[[nn.Module], T]) -> T:
        """What a function makes of a twin of the model; it may be called again with another one."""
        if not self._is_guarded:
            before = torch.random.get_rng_state()
            result = function(twin_of(self.model, shared))
            if torch.equal(torch.random.get_rng_state(), before):
                return result
            self._is_guarded = True  # It draws random numbers after all, or another thread does.
        if not self._writes_parameters:
            with guarded(self.model.parameters(), self._start) as guard:
                try:
                    result = function(twin_of(self.model, with_shared_parameters))
                except Exception:
                    if not guard.refused:
                        raise
            if not guard.refused:
                return result
            self._writes_parameters = True
        with guarded((), self._start):
            return function(twin_of(self.model, cloned))

    def replay(self, examples: Sequence[Tensor], graph: fx.GraphModule) -> Any:
        """What a graph gives that has the model's own parameters; see ``propagate_examples``."""
        with guarded(self.model.parameters(), self._start) if self._is_guarded else nullcontext():
            return propagate_examples(graph, examples)


def comparable() -> Patches:
    """Within this, torch's transformer modules compute as a graph of their operators does."""
    return Patches(OPERATORS_ONLY)
