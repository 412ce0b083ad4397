"""Exponential moving averages of each batch's minimum and maximum."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qcore.errors import ConfigError
from qcore.observer.base import RangeObserver
from qcore.observer.min_max import PerChannelMinMaxObserver


class MovingAverageMinMaxObserver(RangeObserver):
    """Moving average of the minimum and the maximum of the whole tensor.

    Args:
        averaging_constant: weight of the newest batch, above 0 and up to 1.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def __init__(self, averaging_constant: float = 0.01, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not isinstance(averaging_constant, Real) or not 0 < averaging_constant <= 1:
            found = f"averaging_constant must lie within 0..1 and above 0, found {averaging_constant!r}"
            raise ConfigError(f"{type(self).__name__}: {found}")
        self.averaging_constant: float = float(averaging_constant)

    def update(self, smallest: Tensor, largest: Tensor) -> None:
        """Move the range towards two extremes."""
        self.min_val = self._towards(self.min_val, smallest)
        self.max_val = self._towards(self.max_val, largest)

    def _towards(self, average: Tensor, value: Tensor) -> Tensor:
        """The first value replaces the empty average; an infinite one, of a channel without any, moves nothing."""
        moved = average + self.averaging_constant * (value - average)
        return torch.where(torch.isinf(average), value, torch.where(torch.isinf(value), average, moved))


class MovingAveragePerChannelMinMaxObserver(MovingAverageMinMaxObserver, PerChannelMinMaxObserver):
    """Moving average of the minimum and the maximum of each slice along one axis.

    Args:
        averaging_constant: weight of the newest batch, above 0 and up to 1.
        arguments: see :class:`~qcore.observer.min_max.PerChannelMinMaxObserver`.
    """
