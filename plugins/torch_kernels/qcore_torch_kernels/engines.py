"""Torch's quantized engines: libraries of kernels, of which a process has one set at a time.

The engine matters only while weights are packed: a packed weight remembers its own. Of other operators the kernels here
use only those, and in those forms, that give the same bits whatever engine is set.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qcore.plugins.hookspecs import Availability
from qcore_torch_kernels import shells
from qcore_torch_kernels.kernel import PACKING


def supported_engines() -> list[str]:
    """The engines that this torch offers on this machine."""
    return [name for name in torch.backends.quantized.supported_engines if name != "none"]


def has_engine(name: str) -> bool:
    """Whether torch's quantized kernels are there, and this engine of them."""
    return shells.HAS_QUANTIZED and name in supported_engines()


def availability(name: str, isa: str = "") -> Availability:
    """What the probe of a backend on one engine answers.

    Args:
        name: of the engine.
        isa: what to say of the CPU beside torch's own word for it.
    """
    if has_engine(name):
        return Availability(True, isa=", ".join(filter(None, (torch.backends.cpu.get_cpu_capability(), isa))))
    offered = ", ".join(supported_engines()) or "none"
    return Availability(
        False,
        f"torch {torch.__version__} offers the engines {offered} here, not {name}; "
        "use another backend, or a build of torch that has it",
    )


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Pack weights for an engine: it is a setting of the process, so one thread at a time may, and it is put back.

    Args:
        name: of the engine.
    """
    with PACKING, warnings.catch_warnings():
        # torch says that quantized dtypes are deprecated; users of qcore needn't hear it.
        warnings.simplefilter("ignore")
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before
