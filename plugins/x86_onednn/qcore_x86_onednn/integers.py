"""What is done to plain integers without a kernel of oneDNN's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qcore.lowering import QParams, QuantizedWeight


def merge_groups(weight: Tensor, groups: int, number: int) -> Tensor:
    """The weight of the same grouped convolution with every ``number`` neighbouring groups made one.

    Args:
        weight: (out, in / groups, ...).
        groups: of the convolution.
        number: divides ``groups``.

    Returns:
        A weight (out, number * in / groups, ...), zero wherever groups met that had nothing in common.
    """
    out, width, *kernel = weight.shape
    merged = weight.new_zeros(groups // number, number, out // groups, number, width, *kernel)
    for member, part in enumerate(weight.view(groups // number, number, out // groups, width, *kernel).unbind(1)):
        merged[:, member, :, member] = part
    return merged.view(out, number * width, *kernel)


def all_weights_127(window: list[int]) -> tuple[QuantizedWeight, None, QParams, None, tuple[str, list[float], str]]:
    """What a kernel with weights at the end of their range, 16 by 16, and a window is made of."""
    one = torch.ones(16, dtype=torch.float32)
    weight = QuantizedWeight(torch.full((16, 16, *window), 127, dtype=torch.int8), one, one * 0, 0)
    return weight, None, QParams(1.0, 0, 0, 255, torch.uint8), None, ("none", [], "")


def is_exact_at_the_ends(run: Callable[[Tensor], Tensor], window: list[int]) -> bool:
    """Whether such a kernel adds up all that it should for activations of 255."""
    x = torch.full((2, 16, *window), 255, dtype=torch.uint8)
    return bool((run(x) == 127 * 255 * 16 * math.prod(window)).all())
