"""Runs of the user's model that change nothing: not the model, not the random numbers that others draw.

What runs is a twin of the model (``twin.py``). A model that is known to do no more than its graph says runs freely; any
other is guarded (``guard.py``), and if it writes into its parameters, the run is repeated with copies of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import fx, nn

from qcore.fx.graph_module import submodule
from qcore.fx.guard import guarded
from qcore.fx.operators import operator_of
from qcore.fx.patches import Patches
from qcore.fx.tracer import is_torchs_own, writes_in_place
from qcore.fx.twin import cloned, shared, twin_of, with_shared_parameters

T = TypeVar("T")

_RANDOM = (
    "rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "binomial", "gumbel", "rrelu", "fractional",
)  # fmt: skip
_HARMLESS = (
    None, "torch", "torch._C", "torch._C._nn", "torch._C._linalg", "torch.nn.functional", "_operator", "math",
    "builtins", "_functools",
)  # fmt: skip


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
        self._is_guarded = graph is None or not is_harmless(graph)

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
                self._writes_parameters = guard.refused
            if not self._writes_parameters:
                return result
        with guarded((), self._start):
            return function(twin_of(self.model, cloned))

    def replay(self, function: Callable[[], T]) -> T:
        """What a function gives that runs a graph which has the model's own parameters."""
        if not self._is_guarded:
            return function()
        with guarded(self.model.parameters(), self._start):
            return function()


@contextmanager
def comparable() -> Iterator[None]:
    """Let torch's transformer modules compute as a graph of their operators does, and not by a kernel of their own."""
    with Patches() as patches:
        patches.add(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        yield


def is_harmless(graph: fx.GraphModule) -> bool:
    """Whether it is sure that what a graph was traced from draws no random numbers and writes into no parameter."""
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_module":
            module = submodule(graph, str(node.target))
            name = type(module).__name__.lower()
            if not is_torchs_own(module) or any(word in name for word in _RANDOM):
                return False
        elif node.op != "output" and node.args and node.args[0] in constant:
            constant.add(node)
            origin = node.meta.get("origin")
            if origin is None or origin.is_module or writes_in_place(origin.object_type, node.kwargs):
                return False
        if node.op in ("call_function", "call_method") and operator_of(node) is None and not _is_harmless_call(node):
            return False
    return True


def _is_harmless_call(node: fx.Node) -> bool:
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    home = None if isinstance(target, str) else getattr(target, "__module__", None)
    if home not in _HARMLESS and not home.startswith("qcore."):
        return False
    options = {"out", "max_norm"} & {key for key, value in node.kwargs.items() if value is not None}
    return not options and not any(word in name for word in _RANDOM)
