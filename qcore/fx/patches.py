"""Names of the whole process that mean something else to one thread for a while.

A tracer has to see calls of modules, reads of their tensors, torch's factory functions and ``isinstance``, and Python
keeps one of each for all threads. So each is replaced by a function that looks which thread calls it: the one that
asked for it gets the replacement, all others get at once what was there before.
"""

import builtins
import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

_Key = tuple[int, str]


@dataclass
class _Place:
    """A replaced name.

    Attributes:
        owner: a class, a module, or the namespace of a module.
        name: within it.
        original: what was there; ``None`` if nothing was, and a builtin is meant.
        switch: what is there meanwhile.
        count: how often it was asked for, by all threads.
    """

    owner: Any
    name: str
    original: Callable[..., Any] | None
    switch: Callable[..., Any]
    count: int = 0


class _Here(threading.local):
    """What the names mean to this thread."""

    def __init__(self) -> None:
        self.functions: dict[_Key, Callable[..., Any]] = {}


_here = _Here()
_places: dict[_Key, _Place] = {}
_lock = threading.Lock()


class Patches:
    """Within this, some names mean other functions to this thread, and to no other.

    Args:
        functions: for each name its owner, the name, and what it means; see ``add``.
    """

    def __init__(self, functions: Iterable[tuple[Any, str, Callable[..., Any]]] = ()) -> None:
        self._functions = tuple(functions)
        self._keys: list[_Key] = []
        self._before: dict[_Key, Callable[..., Any]] = {}

    def __enter__(self) -> Self:
        self._before = dict(_here.functions)
        for owner, name, function in self._functions:
            self.add(owner, name, function)
        return self

    def add(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Let a name mean a function.

        Args:
            owner: a class, a module, or the namespace of one; a name that a namespace lacks is that of a builtin.
            name: in it.
            function: what it means to this thread.
        """
        key = (id(owner), name)
        with _lock:
            place = _places.get(key)
            if place is None:
                found = _read(owner, name)
                switch = _switch(key, getattr(builtins, name) if found is None else found)
                place = _places[key] = _Place(owner, name, found, switch)
                _write(owner, name, switch)
            place.count += 1
            self._keys.append(key)
        _here.functions[key] = function

    def __exit__(self, *_exception: object) -> None:
        _here.functions = self._before
        with _lock:
            for key in self._keys:
                place = _places[key]
                place.count -= 1
                if place.count == 0:
                    del _places[key]
                    # Whoever replaced it in their turn goes on calling the switch, which leads to what was there.
                    if _read(place.owner, place.name) is place.switch:
                        _write(place.owner, place.name, place.original)


def unpatched(owner: Any, name: str) -> Any:
    """What a name means to threads that replaced nothing; ``None`` if the owner doesn't have it."""
    with _lock:
        place = _places.get((id(owner), name))
        return _read(owner, name) if place is None else place.original


def _switch(key: _Key, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def switch(*args: Any, **kwargs: Any) -> Any:
        return _here.functions.get(key, function)(*args, **kwargs)

    return switch


def _read(owner: Any, name: str) -> Any:
    return (owner if isinstance(owner, dict) else vars(owner)).get(name)


def _write(owner: Any, name: str, value: Any) -> None:
    if not isinstance(owner, dict):
        setattr(owner, name, value)
    elif value is None:
        del owner[name]
    else:
        owner[name] = value
