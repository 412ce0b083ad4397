"""Qparams that are known beforehand, for operators whose range is fixed (sigmoid, softmax, tanh)."""

from typing import Any

import torch
from torch import Tensor

from qcore.observer.base import DatalessObserver


class FixedQParamsObserver(DatalessObserver):
    """Gives the scale and the zero point that it was made with.

    Args:
        scale: real value of one step.
        zero_point: integer that represents zero.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def __init__(self, scale: float, zero_point: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scale = float(scale)
        self.zero_point = int(zero_point)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The given scale (float32, 0-d) and zero point (int64, 0-d)."""
        return torch.tensor(self.scale, dtype=torch.float32), torch.tensor(self.zero_point)
