"""What a backend must leave as it is: the settings of the process that it shares with everybody else."""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor


def _attribute(path: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    owner, _, name = path.rpartition(".")
    return lambda: attrgetter(path)(torch), lambda value: setattr(attrgetter(owner)(torch), name, value)


def _flushes_denormals() -> bool:
    return float(torch.full((), 1e-39) * 1.0) == 0.0


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # Tells everybody who keeps what they say.
    cast(list[Any], warnings.filters).extend(filters)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


#: Each setting, with the functions that read and write it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the engine of quantized operators": _attribute("backends.quantized.engine"),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "the precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the flushing of denormal numbers": (_flushes_denormals, torch.set_flush_denormal),
    "torch's random numbers": (torch.get_rng_state, torch.set_rng_state),
    "Python's random numbers": (random.getstate, random.setstate),
    "the filters of warnings": (lambda: list(warnings.filters), _set_filters),
    "the environment": (lambda: dict(os.environ), _set_environment),
}


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Fail if what is done within changes a setting of the process; and put it back.

    Raises:
        AssertionError: names the settings.
    """
    before = {name: read() for name, (read, _) in _SETTINGS.items()}
    yield
    changed = []
    for name, (read, write) in _SETTINGS.items():
        was, now = before[name], read()
        if not (torch.equal(was, now) if isinstance(was, Tensor) else was == now):
            changed.append(name)
            write(was)
    assert not changed, f"the backend changes {', '.join(changed)} for the whole process"
