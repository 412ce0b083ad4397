"""A look at every operator that a thread computes, before it does: for code that may write, or draw random numbers.

One that would write into a tensor which isn't the code's to write into is refused. One that draws random numbers draws
them from a stream of its own: torch has one generator for the whole process, whose state is exchanged for that one
operator. So the numbers of other threads are neither taken nor given twice.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qcore.fx.dispatch import DispatchMode

_drawing = threading.RLock()


class WriteError(RuntimeError):
    """A forward writes into a tensor of the model that isn't its own to write into."""


class Guard(DispatchMode):
    """Looks at every operator that a thread computes.

    Attributes:
        protected: addresses of storages that mustn't be written into.
        stream: state of the random numbers to be drawn.
        draws: how many operators drew some.
        refused: whether a write was refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.protected: frozenset[int] = frozenset()
        self.stream = torch.empty(0)
        self.draws = 0
        self.refused = False
        self._kinds: dict[Any, tuple[bool, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator, or refuse to."""
        kind = self._kinds.get(func)
        if kind is None:  # To ask takes longer than most operators.
            kind = torch.Tag.nondeterministic_seeded in func.tags, func._schema.is_mutable
            self._kinds[func] = kind
        is_random, is_writing = kind
        if is_writing:
            return self._write(func, args, kwargs or {}, is_random)
        return self._compute(func, args, kwargs or {}, is_random)

    def _compute(self, func: Any, args: Any, kwargs: Any, is_random: bool) -> Any:
        if not is_random:
            return func(*args, **kwargs)
        with _drawing:
            self.draws += 1
            others = torch.random.get_rng_state()
            torch.random.set_rng_state(self.stream)
            try:
                return func(*args, **kwargs)
            finally:
                self.stream = torch.random.get_rng_state()
                torch.random.set_rng_state(others)

    def _write(self, func: Any, args: Any, kwargs: Any, is_random: bool) -> Any:
        versions: list[tuple[Tensor, int]] = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                if self.protected and _address(tensor) in self.protected:
                    self.refused = True
                    raise WriteError(f"{func} writes into a parameter or a buffer of the model")
                if not tensor.is_inference():
                    versions.append((tensor, tensor._version))
        result = self._compute(func, args, kwargs, is_random)
        for tensor, version in versions:
            if tensor._version == version:  # Under a mode torch counts no writes of operators that it doesn't know.
                increment_version(tensor)
        return result


class _Thread(threading.local):
    guard: Guard | None = None


_thread = _Thread()


@contextmanager
def guarded(protected: Iterable[Tensor], stream: Tensor | None = None) -> Iterator[Guard]:
    """Let a guard look at what this thread computes.

    Args:
        protected: tensors that mustn't be written into.
        stream: state of the random numbers to draw from; by default one that no run of a model has.
    """
    before = _thread.guard
    guard = before or Guard()
    outer = guard.protected, guard.stream, guard.draws, guard.refused
    guard.protected = frozenset(_address(tensor) for tensor in protected) - {0}
    guard.stream = torch.Generator().get_state() if stream is None else stream
    guard.draws, guard.refused = 0, False
    try:
        if before is not None:
            yield guard
        else:
            _thread.guard = guard
            with guard:
                yield guard
    finally:
        _thread.guard = before
        if before is not None:
            guard.protected, guard.stream, guard.draws, guard.refused = outer


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0  # One without a storage, such as a sparse one.


def draws() -> int:
    """How many operators drew random numbers since this thread is under its guard."""
    return 0 if _thread.guard is None else _thread.guard.draws


@contextmanager
def aside() -> Iterator[None]:
    """What this thread draws within this under a guard doesn't count, and is drawn after it once more."""
    guard = _thread.guard
    if guard is None:
        yield
        return
    before = guard.stream, guard.draws
    try:
        yield
    finally:
        guard.stream, guard.draws = before
