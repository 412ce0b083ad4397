"""Two factors, as the kernels that multiply integers elementwise like them best."""

import torch
from torch import Tensor

#: How many bytes the kernel multiplies at a time; what is left of a row is multiplied one by one.
_VECTOR = 64
#: A rest of less than this part of a row costs no more than repeating the scale.
_SMALL_REST = 1 / 16


def factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors in the order and the form in which torch's ``quantized::mul`` is fastest.

    The larger one comes first: the first one's layout becomes the result's, and of a scale for each channel it would be
    the wrong one. Where the kernel must broadcast, each pixel's channels are a row of their own, with a rest; so a
    scale is repeated in the shape of what it scales if the rests would cost more.

    Args:
        a: a factor, plain or quantized.
        b: the other one, which broadcasts to it, or it to this.
    """
    large, small = (a, b) if a.numel() >= b.numel() else (b, a)
    channels = large.shape[1] if large.dim() == 4 and small.shape == (*large.shape[:2], 1, 1) else 0
    if channels % _VECTOR > channels * _SMALL_REST:
        small = small.expand(large.shape).contiguous(memory_format=torch.channels_last)
    return large, small
