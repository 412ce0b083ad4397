"""torch's kernels for quantized tensors, as functions of plain uint8 tensors.

A plain tensor and a quantized one share their storage here, so nothing is copied between the two families. Where a
torch no longer has the quantized one, ``HAS_QUANTIZED`` is false and these functions must not be called.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

_QUANTIZED_DTYPE: torch.dtype = getattr(torch, "quint8", torch.uint8)

#: Whether this torch has all that these functions need.
HAS_QUANTIZED = (
    torch.uint8 != _QUANTIZED_DTYPE
    and hasattr(torch, "_empty_affine_quantized")
    and hasattr(torch, "quantize_per_tensor")
    and hasattr(torch.ops.quantized, "max_pool2d")
)

if HAS_QUANTIZED:
    with warnings.catch_warnings():
        # torch says once in a process that quantized dtypes are deprecated; users of qcore needn't hear it.
        warnings.simplefilter("ignore")
        torch._empty_affine_quantized([0], scale=1.0, zero_point=0, dtype=_QUANTIZED_DTYPE)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, _QUANTIZED_DTYPE)


def _as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor on the storage of a plain one."""
    shell: Any = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=_QUANTIZED_DTYPE)
    made: Tensor = shell.set_(x, x.storage_offset(), x.size(), x.stride())  # Of which the type stubs don't know.
    return made


def _as_plain(x: Tensor) -> Tensor:
    """A plain tensor on the storage of a quantized one."""
    shell: Any = torch.empty(0, dtype=torch.uint8)
    made: Tensor = shell.set_(x, x.storage_offset(), x.size(), x.stride())  # Of which the type stubs don't know.
    return made


def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Float to uint8."""
    return _as_plain(torch.quantize_per_tensor(x, scale, zero_point, _QUANTIZED_DTYPE))


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """uint8 to float."""
    return _as_quantized(x, scale, zero_point).dequantize()


def add(
    a: Tensor, b: Tensor, a_qparams: tuple[float, int], b_qparams: tuple[float, int], qparams: tuple[float, int]
) -> Tensor:
    """A sum of two tensors of the same shape; the qparams are scales and zero points."""
    layout = torch.channels_last if a.dim() == 4 else torch.contiguous_format
    scale, zero_point = qparams
    out = torch._empty_affine_quantized(
        a.shape, scale=scale, zero_point=zero_point, dtype=_QUANTIZED_DTYPE, memory_format=layout
    )
    # The form with an output doesn't look at the process's quantized engine.
    torch.ops.quantized.add.out(_as_quantized(a, *a_qparams), _as_quantized(b, *b_qparams), out)
    return _as_plain(out)


def mul(
    a: Tensor, b: Tensor, a_qparams: tuple[float, int], b_qparams: tuple[float, int], qparams: tuple[float, int]
) -> Tensor:
    """A product of two tensors that broadcast; the qparams are scales and zero points."""
    return _as_plain(
        torch.ops.quantized.mul.default(_as_quantized(a, *a_qparams), _as_quantized(b, *b_qparams), *qparams)
    )
