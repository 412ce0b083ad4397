"""Qparams and integer weights as lowering finds them in a reference model: what kernels are made of."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcore import ops


@dataclass(frozen=True)
class QParams:
    """How a per-tensor quantized value maps to real numbers: ``(q - zero_point) * scale``.

    Attributes:
        scale: real value of one step.
        zero_point: integer that represents zero.
        quant_min: smallest integer that the value takes.
        quant_max: largest integer that the value takes.
        dtype: of the integers.
        clamp: the smallest and the largest real number, where a clamp before the quantize is left to it.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    clamp: tuple[float, float] = (-math.inf, math.inf)

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The smallest and the largest integer, if they are not just those of the dtype.

        Rounding is monotone, so to clamp and then quantize is to quantize and then clamp between the bounds' integers.
        """
        info = torch.iinfo(self.dtype)
        low, high = map(self.quantize, self.clamp)
        return None if (low, high) == (info.min, info.max) else (low, high)

    def clamped(self, low: float | None, high: float | None) -> "QParams":
        """The same for values that are clamped once more; ``None`` is no bound."""
        most = math.inf if high is None else high
        least = -math.inf if low is None else min(low, most)  # Of two bounds that cross, torch takes the upper one.
        low, high = (min(max(bound, least), most) for bound in self.clamp)
        return replace(self, clamp=(low, high))

    def quantize(self, value: float) -> int:
        """The integer that stands for a real number, just as ``qcore::quantize_per_tensor`` gives it."""
        if math.isinf(value):
            return self.quant_max if value > 0 else self.quant_min
        if value == 0:  # As most bounds are; it needs no tensor.
            return min(max(self.zero_point, self.quant_min), self.quant_max)
        scale, real = (torch.tensor(number, dtype=torch.float32) for number in (self.scale, value))
        arguments = (scale, torch.tensor(self.zero_point), self.quant_min, self.quant_max, torch.int32)
        return int(ops.quantize_per_tensor(real, *arguments))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers: ``(values - zero_point) * scale``, along ``axis`` if it isn't ``None``."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    @property
    def scale_per_channel(self) -> Tensor:
        """One scale for each output channel (axis 0), also for a weight quantized as a whole."""
        return self.scale if self.axis is not None else self.scale.expand(self.values.shape[0]).clone()
