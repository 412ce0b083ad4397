"""Exponential moving averages of each batch's minimum and maximum."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qcore.dtypes import QScheme
from qcore.errors import ConfigError
from qcore.observer.base import RangeObserver
from qcore.observer.min_max import PerChannelMinMaxObserver


def _towards(average: Tensor, value: Tensor, constant: float) -> Tensor:
    """``average`` moved towards ``value`` by ``constant``; the first value replaces the empty average.

    An infinite ``value`` is that of a channel without a finite one: it moves nothing.
    """
    moved = average + constant * (value - average)
    return torch.where(torch.isinf(average), value, torch.where(torch.isinf(value), average, moved))


def _checked_constant(value: float, observer: str) -> float:
    if not isinstance(value, Real) or not 0 < value <= 1:
        raise ConfigError(f"{observer}: averaging_constant must lie within 0..1 and above 0, found {value!r}")
    return float(value)


class MovingAverageMinMaxObserver(RangeObserver):
    """Moving average of the minimum and the maximum of the whole tensor.

    Args:
        averaging_constant: weight of the newest batch, above 0 and up to 1.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def __init__(self, averaging_constant: float = 0.01, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.averaging_constant = _checked_constant(averaging_constant, type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        """Move the range towards that of ``x`` and return ``x``."""
        seen = self.finite(x)
        if seen is not None:
            smallest, largest = self.min_val.new_tensor(seen[1:])
            self.min_val = _towards(self.min_val, smallest, self.averaging_constant)
            self.max_val = _towards(self.max_val, largest, self.averaging_constant)
        return x


class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Moving average of the minimum and the maximum of each slice along one axis.

    Args:
        averaging_constant: weight of the newest batch, above 0 and up to 1.
        ch_axis: the axis.
        qscheme: a per-channel scheme.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        qscheme: object = QScheme.per_channel_affine,
        **arguments: Any,
    ) -> None:
        super().__init__(ch_axis=ch_axis, qscheme=qscheme, **arguments)
        self.averaging_constant = _checked_constant(averaging_constant, type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        """Move each channel's range towards that of ``x`` and return ``x``."""
        extremes = self.channel_extremes(x)
        if extremes is not None:
            self.min_val = _towards(self.min_val.expand_as(extremes[0]), extremes[0], self.averaging_constant)
            self.max_val = _towards(self.max_val.expand_as(extremes[1]), extremes[1], self.averaging_constant)
        return x
