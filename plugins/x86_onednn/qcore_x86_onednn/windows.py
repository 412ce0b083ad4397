"""Convolutions whose windows lie so that oneDNN's kernels are wrong, as others that give the same.

Found by experiment, against exact sums: where a window lies in nothing but padding, along any dimension, the kernels
may read behind their input and crash. Those for AMX compute from memory that nobody wrote where the result is one
column wide and steps along the width are larger than 1, or where a volume of one layer is padded along its depth; and
with a zero point other than 0 they are wrong, or write where they mustn't, where padding lies above and below but not
beside the input, or around it in a dilated convolution. Depthwise convolutions have kernels of their own, which are
right.

Padding that is written around the input makes all these ordinary cases. Where there is one column, its step doesn't
matter, if the input is cut to what the column sees.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qcore.errors import ShapeError

#: Stride, padding and dilation, one number for each dimension, and groups.
Geometry = tuple[list[int], list[int], list[int], int]


@dataclass(frozen=True)
class Rewritten:
    """The same convolution, without padding, of an input that was padded and cut.

    Attributes:
        pad: as ``F.pad`` takes it; negative numbers cut.
        stride: one number for each dimension.
    """

    pad: tuple[int, ...]
    stride: tuple[int, ...]


def rewritten(
    sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry, has_zero_point: bool = False
) -> Rewritten | None:
    """How to compute a convolution of an input of some size; ``None`` if the kernels are right about it as it is.

    Args:
        sizes: of the input, without batch and channels.
        kernel: sizes of the kernel.
        geometry: of the convolution.
        has_zero_point: whether zero is another integer than 0, and the convolution isn't depthwise.

    Raises:
        ShapeError: the input, with its padding, is smaller than the kernel.
    """
    stride, padding, dilation, _ = geometry
    reach = [step * (k - 1) + 1 for k, step in zip(kernel, dilation, strict=True)]
    places = list(zip(sizes, stride, padding, reach, strict=True))
    results = [(size + 2 * before - wide) // step + 1 for size, step, before, wide in places]
    if min(results) < 1:
        raise ShapeError(
            f"an input of the sizes {tuple(sizes)}, padded on both sides by {tuple(padding)}, is smaller than a kernel "
            f"that covers {tuple(reach)}"
        )
    is_column = results[-1] == 1 and stride[-1] > 1 and kernel[-1] > 1
    is_sheet = len(kernel) == 3 and sizes[0] == 1 and padding[0] > 0
    is_shifted = has_zero_point and any(padding) and (padding[-1] == 0 or max(dilation) > 1)
    windows = zip(sizes, stride, padding, kernel, dilation, results, strict=True)
    if not (is_column or is_sheet or is_shifted or any(_is_blind(*window) for window in windows)):
        return None
    pad: list[int] = []
    for (size, step, before, wide), number in zip(places, results, strict=True):
        pad = [before, (number - 1) * step + wide - size - before, *pad]  # The last dimension comes first.
    return Rewritten(tuple(pad), (*stride[:-1], 1 if is_column else stride[-1]))


def _is_blind(size: int, step: int, padding: int, kernel: int, dilation: int, results: int) -> bool:
    """Whether some window, along one dimension, sees nothing but padding."""
    starts = range(-padding, results * step - padding, step) if padding else ()
    return any(all(not 0 <= start + k * dilation < size for k in range(kernel)) for start in starts)


def in_any_windows(
    weight: Tensor, geometry: Geometry, zero_point: int, run_of: Callable[[Geometry], Callable[[Tensor], Tensor]]
) -> Callable[[Tensor], Tensor]:
    """A convolution of batches that is right for inputs of any size.

    Args:
        weight: (out, in / groups, ...).
        geometry: of the convolution.
        zero_point: of the input.
        run_of: gives oneDNN's kernel for a geometry.
    """
    run, find = run_of(geometry), rewriting(weight, geometry, zero_point)
    no_padding = [0] * (weight.dim() - 2)
    without_padding = functools.cache(lambda stride: run_of((list(stride), no_padding, *geometry[2:])))

    def around(x: Tensor) -> Tensor:
        found = find(x.shape[2:])
        if found is None:
            return run(x)
        y: Tensor = without_padding(found.stride)(F.pad(x, found.pad, value=zero_point))
        return y

    return around


def rewriting(weight: Tensor, geometry: Geometry, zero_point: int) -> Callable[[torch.Size], Rewritten | None]:
    """:func:`rewritten` for a convolution, of the sizes that it meets."""
    is_depthwise = weight.dim() == 4 and weight.shape[1] == 1 and weight.shape[0] == geometry[3] > 1
    has_zero_point = zero_point != 0 and not is_depthwise
    return functools.lru_cache(64)(lambda sizes: rewritten(sizes, weight.shape[2:], geometry, has_zero_point))
