"""An fx tracer that other threads of the process don't notice.

``fx.Tracer.trace`` replaces what all threads call: a model that another thread serves meanwhile is traced as well, and
fails. This one replaces the same names for its own thread only (``patches.py``).
"""

import builtins
import inspect
import math
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace

from qcore.fx.patches import Patches, unpatched
from qcore.fx.values import is_value, values_in

#: Functions that make tensors of sizes; torch doesn't ask a proxy about them, or asks it wrongly.
_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
)  # fmt: skip

#: Lets torch's transformer modules compute by operators that a graph can hold, and not by a kernel of their own or by
#: what a mask holds. (Whether a mask is causal is a hint: it changes how attention is computed, not what.)
OPERATORS_ONLY: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch.backends.mha, "get_fastpath_enabled", lambda: False),
    (nn.modules.transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True),
)

_MATH = {name: found for name, found in vars(math).items() if isinstance(found, BuiltinFunctionType)}
_MATH_IDS = frozenset(id(found) for found in _MATH.values())


class ThreadTracer(fx.Tracer):
    """Traces in its own thread; what its subclasses decide is what fx lets a tracer decide.

    Attributes:
        is_evaluating: whether the tracer itself runs part of the graph.
    """

    is_evaluating = False

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """A module's forward as a graph.

        Args:
            root: whose forward is run.
            concrete_args: see ``fx.Tracer.trace``.
        """
        forward = type(root).forward
        self.root = root
        self.root_module_name = type(root).__name__
        self.submodule_paths = {module: path for path, module in root.named_modules()}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {}
        function, args = self.create_args_for_root(forward, True, concrete_args)
        with Patches(self.replacements()) as self._patches:
            self._seen: set[int] = set()
            for traced in (forward, F.relu):  # Torch's functions ask what they are given, too.
                self.look_into(traced)
            self.create_node("output", "output", (self.create_arg(function(*args)),), {})
        return self.graph

    def replacements(self) -> Iterable[tuple[Any, str, Callable[..., Any]]]:
        """What means something else while a forward is traced: an owner, a name in it, and the function."""
        call, read = unpatched(nn.Module, "__call__"), unpatched(nn.Module, "__getattr__")
        attributes: dict[str, fx.Proxy] = {}

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.look_into(getattr(type(module), "forward", None))
            return self.call_module(module, lambda *a, **k: call(module, *a, **k), args, kwargs)

        def attribute(module: nn.Module, name: str) -> Any:
            return self.getattr(name, read(module, name), attributes)

        yield nn.Module, "__call__", called
        yield nn.Module, "__getattr__", attribute
        yield from OPERATORS_ONLY
        yield torch, "is_tensor", lambda item: self.isinstance(item, torch.Tensor)
        for name in ("is_floating_point", "is_complex"):
            yield torch, name, _as_method(name, unpatched(torch, name))
        for name in _FACTORIES:
            yield torch, name, self.recorded(unpatched(torch, name), is_random=name.startswith("rand"))
        for name, found in _MATH.items():
            yield math, name, self.recorded(found)
        for (_, name), space in list(_symbolic_trace._wrapped_fns_to_patch.items()):  # What ``fx.wrap`` was called for.
            yield space, name, self.recorded(unpatched(space, name) or getattr(builtins, name))
        for owner, name in list(_symbolic_trace._wrapped_methods_to_patch):
            yield owner, name, self.recorded(unpatched(owner, name), name)

    def look_into(self, forward: Any) -> None:
        """A function is going to be traced: names of its file may have to mean something else."""
        if id(forward) in self._seen or not isinstance(forward, FunctionType):
            return
        self._seen.add(id(forward))
        for function in (forward, inspect.unwrap(forward)):
            space = getattr(function, "__globals__", None)
            if space is None or id(space) in self._seen:
                continue
            self._seen.add(id(space))
            for name, found in list(space.items()):
                if id(found) in _MATH_IDS:
                    self._patches.add(space, name, self.recorded(found))
            if unpatched(space, "isinstance") is None:
                self._patches.add(space, "isinstance", self.isinstance)

    def isinstance(self, value: Any, classes: Any) -> bool:
        """``isinstance`` as a traced forward means it."""
        return isinstance(value, classes)

    def recorded(
        self, function: Callable[..., Any], method: str = "", *, is_random: bool = False
    ) -> Callable[..., Any]:
        """A function (or method) that is a node of the graph where it is given values of the graph, or is random."""

        def call(*args: Any, **kwargs: Any) -> Any:
            # A random number that is drawn while tracing would be the same in every call.
            if self.is_evaluating or not (is_random or values_in((args, kwargs))):
                return function(*args, **kwargs)
            kind, target = ("call_method", method) if method else ("call_function", function)
            return self.create_proxy(kind, target, args, kwargs)

        return call


def _as_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that asks a value's method instead."""
    return lambda value: getattr(value, name)() if is_value(value) else function(value)
