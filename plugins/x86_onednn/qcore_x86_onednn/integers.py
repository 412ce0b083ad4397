"""What is done to plain integers without a kernel of oneDNN's."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qcore.kernel import KernelModule, QParams


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


class QNearest(KernelModule):
    """Interpolation that only repeats or drops elements, on integers as they are.

    Args:
        size: of the result.
        scale_factor: if there is no size.
        mode: ``"nearest"`` or ``"nearest-exact"``.
    """

    kernel_name = "interpolate on integers"

    def __init__(self, size: Any, scale_factor: Any, mode: str) -> None:
        super().__init__()
        self.arguments = (size, scale_factor, mode)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own."""
        arguments = self.arguments
        return lambda x: F.interpolate(x, *arguments)


class QClamp(KernelModule):
    """A clamp on integers as they are.

    Args:
        output: qparams of input and result, with the bounds as their clamp.
    """

    kernel_name = "clamp on integers"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own."""
        low, high = self.bounds("output") or (0, 255)
        return lambda x: x.clamp(low, high)
