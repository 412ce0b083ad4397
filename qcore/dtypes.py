"""Integer dtypes and quantization schemes, as plain data.

qcore computes on plain ``uint8``/``int8``/``int32`` tensors. Existing code says ``torch.quint8`` and
``torch.per_tensor_affine``, which torch has deprecated; both are accepted wherever a dtype or a scheme is asked for
and are read by their name, so that this file still imports when torch has deleted them.
"""

from collections.abc import Callable
from enum import Enum
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from qcore.errors import ConfigError

_SHORT_NAMES = {torch.uint8: "uint8", torch.int8: "int8", torch.int16: "int16", torch.int32: "int32"}

#: The plain dtype of a quantized one, by name.
_PLAIN = {"torch.quint8": torch.uint8, "torch.qint8": torch.int8, "torch.qint32": torch.int32}


class QScheme(Enum):
    """How real values map to integers; the members carry torch's names."""

    per_tensor_affine = "per_tensor_affine"
    per_tensor_symmetric = "per_tensor_symmetric"
    per_channel_affine = "per_channel_affine"
    per_channel_symmetric = "per_channel_symmetric"

    @property
    def per_channel(self) -> bool:
        """Whether each channel has a scale of its own."""
        return self.value.startswith("per_channel")

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed in the middle of the range."""
        return self.value.endswith("symmetric")


def canonical_dtype(dtype: torch.dtype) -> torch.dtype:
    """The plain dtype that holds the same integers (``torch.quint8`` becomes ``torch.uint8``).

    Args:
        dtype: any torch dtype.

    Raises:
        ConfigError: ``dtype`` isn't a torch dtype, or is a quantized one that qcore doesn't know.
    """
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"expected a torch.dtype such as torch.uint8 or torch.int8, found {dtype!r}")
    if dtype in _SHORT_NAMES:
        return dtype
    plain = _PLAIN.get(str(dtype), dtype)
    if str(plain).startswith(("torch.quint", "torch.qint")):
        raise ConfigError(f"{dtype} isn't supported; use one of torch.uint8, torch.int8, torch.int32")
    return plain


def canonical_qscheme(qscheme: object) -> QScheme:
    """``torch.per_tensor_affine`` and its relatives, or a :class:`QScheme`, as a :class:`QScheme`.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(qscheme, QScheme):
        return qscheme
    found = QScheme.__members__.get(str(qscheme).removeprefix("torch."))
    if found is not None:
        return found
    raise ConfigError(f"expected a qscheme, one of {', '.join(QScheme.__members__)}; found {qscheme!r}")


def is_integer(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is one that quantized values are stored in."""
    return dtype in _SHORT_NAMES


def checked_scale(value: Any, name: str) -> float:
    """A number that can be a scale: positive, and within float32's normal numbers.

    Raises:
        ConfigError: it can't be one.
    """
    limits = torch.finfo(torch.float32)
    if isinstance(value, bool) or not isinstance(value, Real) or not limits.tiny <= float(value) <= limits.max:
        raise ConfigError(f"{name} must be a positive number that float32 holds, found {value!r}")
    return float(value)


def checked_integer(value: Any, name: str) -> int:
    """An integer, of Python or numpy.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be an integer, found {value!r}")
    return int(value)


def dtype_range(dtype: torch.dtype) -> tuple[int, int]:
    """The smallest and the largest integer of ``dtype``."""
    info = torch.iinfo(dtype)
    return info.min, info.max


def dtype_name(dtype: torch.dtype | None) -> str:
    """``dtype`` as a reader wants it: ``uint8`` rather than ``torch.uint8``."""
    return "any" if dtype is None else _SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def same_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module`` applies to its tensors (to another device, another dtype), without the change of dtype."""

    def moved(tensor: Tensor) -> Tensor:
        found = move(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved
