"""Torch's quantized tensors and plain ones on the same memory: each is a shell around it.

A quantized kernel takes quantized tensors, and whatever is done to integers as they are is done to plain ones. Nothing
is copied from one to the other, and a recording knows that both are one value
(:func:`qcore_torch_kernels.replay.recording.show`).
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from qcore_torch_kernels.replay.recording import show

#: The dtype of quantized activations.
DTYPE: torch.dtype = getattr(torch, "quint8", torch.uint8)

#: Whether this torch still has quantized tensors, and kernels for them.
HAS_QUANTIZED = (
    torch.uint8 != DTYPE
    and hasattr(torch, "_empty_affine_quantized")
    and hasattr(torch, "quantize_per_tensor")
    and hasattr(torch.ops.quantized, "max_pool2d")
)

if HAS_QUANTIZED:
    with warnings.catch_warnings():
        # torch says once in a process that quantized dtypes are deprecated; users of qcore needn't hear it.
        warnings.simplefilter("ignore")
        torch._empty_affine_quantized([0], scale=1.0, zero_point=0, dtype=DTYPE)
        torch.quantize_per_tensor(torch.zeros(1, dtype=torch.float32), 1.0, 0, DTYPE)


def as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor on the memory of a plain one.

    Args:
        x: uint8.
        scale: of the quantized tensor.
        zero_point: likewise.
    """
    return show(torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=DTYPE), x)


def as_plain(x: Tensor) -> Tensor:
    """A plain tensor, uint8, on the memory of a quantized one."""
    return show(torch.empty(0, dtype=torch.uint8), x)


def on_integers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of plain integers that keeps their qparams, for quantized tensors as well.

    Args:
        function: of tensors of uint8; of quantized ones it gets the integers, and its result gets the first one's
            scale and zero point.
    """

    def run(*inputs: Tensor) -> Tensor:
        first = inputs[0]
        if not first.is_quantized:
            return function(*inputs)
        integers = [as_plain(x) if isinstance(x, Tensor) else x for x in inputs]
        return as_quantized(function(*integers), first.q_scale(), first.q_zero_point())

    return run


def bounded(run: Callable[..., Tensor], bounds: tuple[int, int] | None) -> Callable[..., Tensor]:
    """A kernel whose results, plain or quantized, are cut to the smallest and the largest integer that they may take.

    Args:
        run: gives a tensor that nothing else has.
        bounds: see :attr:`qcore.lowering.QParams.bounds`.
    """
    if bounds is None:
        return run
    low, high = bounds
    # On the memory of the result itself, but returned as what the clamp gave: a compiler that sees only schemas doesn't
    # know that the two share it, and would drop a clamp whose result nobody reads.
    clamp = on_integers(lambda x: x.clamp_(low, high))
    return lambda *inputs: clamp(run(*inputs))


def quantized_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight as the packing functions of torch's engines take it.

    Args:
        weight: int8, symmetric.
        scale: float32; one, or one for each place along axis 0.
    """
    if scale.dim() == 0:
        return torch._make_per_tensor_quantized_tensor(weight, float(scale), 0)
    zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
