"""A look at every operator that a thread computes, before it does: for code that may write, or draw random numbers.

One that would write into a tensor which isn't the code's to write into is refused. One that draws random numbers draws
them from a stream of its own: torch has one generator for the whole process, whose state is exchanged for that one
operator. So the numbers of other threads are neither taken nor given twice.
"""

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qcore.fx.dispatch import DispatchMode
from qcore.fx.values import UndecidableError

_drawing = threading.RLock()


class WriteError(RuntimeError):
    """A forward writes into a tensor of the model that isn't its own to write into."""


def memory_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in: its address, if it has one; 0 for a tensor without a storage."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or int(storage._cdata)
    except (RuntimeError, NotImplementedError):
        return 0  # Such as a sparse one.


@dataclass
class RealCalls:
    """What a forward computes, while it is traced, with tensors that are no values of its graph.

    Such calls are made once, and what they give becomes constants of the graph. That is right for tensors that the
    forward makes itself; one that was there before is the state of something, and a graph wouldn't write it again.

    Attributes:
        made: memory that the forward made; with the storages, lest another gets the same number.
        written: memory of which the graph holds what is in it, and its tensors don't.
    """

    made: dict[int, Any] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)

    def check(self, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Look at the tensors that an operator is given.

        Raises:
            UndecidableError: a graph couldn't do the same.
        """
        if not self.written.isdisjoint(map(memory_of, read)):
            raise UndecidableError("it writes data into a tensor that it made, and computes with that")
        if not self.made.keys() >= set(map(memory_of, written)):
            raise UndecidableError("it writes into a tensor that is kept for later calls")

    def note(self, func: Any, read: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Note what an operator made."""
        # ``torch.tensor`` makes its tensor unseen, and has it lifted.
        known = set() if func is torch.ops.aten.lift_fresh.default else set(map(memory_of, read))
        self.made.update({memory_of(t): t.untyped_storage() for t in results if memory_of(t) not in (0, *known)})


@dataclass
class Watch:
    """What is looked for in the code that a thread runs.

    Attributes:
        protected: memory that mustn't be written into.
        stream: state of the random numbers to be drawn.
        real_calls: of the forward that is traced, if one is.
        draws: how many operators drew random numbers.
        refused: whether a write was refused.
    """

    protected: frozenset[int]
    stream: Tensor
    real_calls: RealCalls | None = None
    draws: int = 0
    refused: bool = False


class _Thread(threading.local):
    watch: Watch | None = None


_thread = _Thread()


class _Guard(DispatchMode):
    """Looks at every operator that a thread computes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator, or refuse to."""
        kwargs = kwargs or {}
        watch = _thread.watch
        assert watch is not None
        real_calls = watch.real_calls
        is_random, places = _effects(func)
        if not (real_calls or is_random or places):
            return func(*args, **kwargs)
        read = _tensors((*args, *kwargs.values()))
        written = _tensors(args[n] if n < len(args) else kwargs.get(name) for n, name in places)
        if real_calls:
            real_calls.check(read, written)
        if not watch.protected.isdisjoint(map(memory_of, written)):
            watch.refused = True
            raise WriteError(f"{func} writes into a parameter or a buffer of the model")
        versions = [(tensor, tensor._version) for tensor in written if not tensor.is_inference()]
        result = _drawn(watch, func, args, kwargs) if is_random else func(*args, **kwargs)
        for tensor, version in versions:
            if tensor._version == version:  # Under a mode torch counts no writes of operators that it doesn't know.
                increment_version(tensor)
        if real_calls:
            real_calls.note(func, read, _tensors(result if isinstance(result, (list, tuple)) else (result,)))
        return result


@functools.cache  # To ask takes longer than most operators.
def _effects(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Whether an operator draws random numbers, and the places and names of the arguments that it writes into."""
    arguments = enumerate(func._schema.arguments)
    written = ((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return torch.Tag.nondeterministic_seeded in func.tags, tuple(written)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an operator, of which some are lists."""
    opened = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
    return [item for items in opened for item in items if isinstance(item, Tensor)]


def _drawn(watch: Watch, func: Any, args: Any, kwargs: Any) -> Any:
    with _drawing:
        watch.draws += 1
        others = torch.random.get_rng_state()
        torch.random.set_rng_state(watch.stream)
        try:
            return func(*args, **kwargs)
        finally:
            watch.stream = torch.random.get_rng_state()
            torch.random.set_rng_state(others)


@contextmanager
def guarded(
    protected: Iterable[Tensor], stream: Tensor | None = None, real_calls: RealCalls | None = None
) -> Iterator[Watch]:
    """Look at what this thread computes.

    Args:
        protected: tensors that mustn't be written into.
        stream: state of the random numbers to draw from; by default one that no run of a model has.
        real_calls: of a forward that is traced.
    """
    outer = _thread.watch
    stream = torch.Generator().get_state() if stream is None else stream
    watch = Watch(frozenset(map(memory_of, protected)) - {0}, stream, real_calls)
    _thread.watch = watch
    try:
        with _Guard() if outer is None else nullcontext():
            yield watch
    finally:
        _thread.watch = outer


def draws() -> int:
    """How many operators drew random numbers since this thread is under its guard."""
    return 0 if _thread.watch is None else _thread.watch.draws


@contextmanager
def aside() -> Iterator[None]:
    """Within this a thread runs what isn't the code's: its draws don't count, and are made after it once more."""
    watch = _thread.watch
    if watch is None:
        yield
        return
    before = watch.stream, watch.draws, watch.real_calls
    watch.real_calls = None
    try:
        yield
    finally:
        watch.stream, watch.draws, watch.real_calls = before
