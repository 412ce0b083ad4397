"""Qparams that are known beforehand, for operators whose range is fixed (sigmoid, softmax, tanh)."""

from typing import Any

import torch
from torch import Tensor

from qcore.dtypes import checked_integer, checked_scale
from qcore.errors import ConfigError
from qcore.observer.base import DatalessObserver


class FixedQParamsObserver(DatalessObserver):
    """Gives the scale and the zero point that it was made with.

    Args:
        scale: real value of one step.
        zero_point: integer that represents zero.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.

    Raises:
        ConfigError: the scale isn't a positive number, or the zero point no integer of the range.
    """

    def __init__(self, scale: float, zero_point: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scale = checked_scale(scale, "FixedQParamsObserver: scale")
        low, high = self.quant_min, self.quant_max
        self.zero_point = checked_integer(zero_point, "FixedQParamsObserver: zero_point")
        if low < high and not low <= self.zero_point <= high:  # A float dtype has no range.
            raise ConfigError(f"FixedQParamsObserver: zero_point {zero_point} lies outside the range {low}..{high}")

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale (float32, 0-d) and zero point (int64, 0-d)."""
        return torch.tensor(self.scale, dtype=torch.float32), torch.tensor(self.zero_point)
