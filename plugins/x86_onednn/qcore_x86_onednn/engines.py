"""Which engine of torch's computes a convolution or a linear layer the fastest, as measured with VNNI and without.

oneDNN's kernels cost some microseconds more to call than FBGEMM's, which take longer for each result. The choice
depends on weights and shapes alone, so that the same call computes the same bits everywhere in a process.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcore_x86_onednn.observers import fits_depthwise_kernel


@dataclass(frozen=True)
class Limits:
    """Up to where FBGEMM is the faster one.

    Attributes:
        rows: of a linear layer.
        rows_then_float: the same where an activation follows, which FBGEMM leaves to be computed in float.
        pixels: of a 1x1 convolution's input, over the batch.
        results: elements that a 1x1 convolution gives.
    """

    rows: int
    rows_then_float: int
    pixels: float
    results: float


#: 1 to 64 rows take 0.25 to 0.8 of oneDNN's time, 128 take 0.85 to 0.95, thousands 1.1.
WITHOUT_VNNI = Limits(rows=128, rows_then_float=16, pixels=16, results=math.inf)
#: One row takes 0.6 of oneDNN's time, 16 take 0.8 to 0.95. One pixel takes 0.4 to 0.55 in a replay, 7x7 and 14x14 up to
#: this many results 0.85 to 1.1, 28x28 with some more 1.15 to 1.35.
WITH_VNNI = Limits(rows=16, rows_then_float=1, pixels=math.inf, results=22_000)


def limits(has_vnni: bool) -> Limits:
    """Those of this CPU."""
    return WITH_VNNI if has_vnni else WITHOUT_VNNI


def engine_of_conv(
    weight: Tensor,
    geometry: tuple[list[int], list[int], list[int], int],
    input_max: int,
    shape: torch.Size,
    has_vnni: bool,
) -> str:
    """The engine for a 2d convolution, where both are there.

    Args:
        weight: int8, (out, in / groups, height, width).
        geometry: stride, padding, dilation and groups.
        input_max: the largest integer that the activation takes.
        shape: of the input.
        has_vnni: whether sums of pairs have 32 bits. If not, the weights are such that oneDNN's can't saturate.
    """
    stride, padding, dilation, groups = geometry
    kernel, channels = list(weight.shape[2:]), weight.shape[0]
    if kernel == [1, 1] and groups == 1:
        limit, pixels = limits(has_vnni), shape[0] * math.prod(shape[2:])
        results = pixels / math.prod(stride) * channels
        return "fbgemm" if pixels <= limit.pixels and results <= limit.results else "onednn"
    # FBGEMM's depthwise kernels know no other padding, and pair what oneDNN's don't, with VNNI too.
    is_usual = list(padding) == [size // 2 for size in kernel] and max(dilation) == 1
    fits = is_usual and groups == channels and not has_vnni and fits_depthwise_kernel(weight, input_max)
    return "fbgemm" if fits else "onednn"
