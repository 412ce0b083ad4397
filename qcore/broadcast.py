"""Two factors, as the kernels that multiply integers elementwise like them best."""

import torch
from torch import Tensor


def factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors in the order and the form in which torch's ``quantized::mul`` is fastest.

    The larger one comes first: the first one's layout becomes the result's, and of a scale for each channel it would be
    the wrong one. Of each pixel's channels the kernel takes 64 at a time and the rest one by one, unless it needn't
    broadcast; so a scale is repeated where the rest would cost more.

    Args:
        a: a factor, plain or quantized.
        b: the other one, which broadcasts to it, or it to this.
    """
    large, small = (a, b) if a.numel() >= b.numel() else (b, a)
    channels = large.shape[1] if large.dim() == 4 and small.shape == (*large.shape[:2], 1, 1) else 0
    if channels % 64 * 16 > channels:
        small = small.expand(large.shape).contiguous(memory_format=torch.channels_last)
    return large, small
