"""The smallest and the largest value ever seen, for the whole tensor or for each channel."""

from typing import Any

import torch
from torch import Tensor

from qcore.dtypes import QScheme
from qcore.observer.base import RangeObserver


class MinMaxObserver(RangeObserver):
    """Running minimum and maximum of the whole tensor.

    Args:
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Widen the range by ``x`` (any shape, floating dtype) and return ``x``."""
        seen = self.finite(x)
        if seen is not None:
            _, smallest, largest = seen
            self.min_val = torch.minimum(self.min_val, smallest)
            self.max_val = torch.maximum(self.max_val, largest)
        return x


class PerChannelMinMaxObserver(RangeObserver):
    """Running minimum and maximum of each slice along one axis.

    Args:
        ch_axis: the axis; 0 is the output channel of a convolution's or a linear's weight.
        qscheme: a per-channel scheme.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def __init__(
        self, ch_axis: int = 0, qscheme: object = QScheme.per_channel_affine, **arguments: Any
    ) -> None:
        super().__init__(qscheme=qscheme, **arguments)
        self.ch_axis = ch_axis

    def channel_extremes(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest finite value of each channel of ``x``; ``None`` if a channel has none."""
        seen = self.finite(x)
        if seen is None:
            return None
        values = x.detach().to(torch.float32)
        rows = values.movedim(self.ch_axis, 0).flatten(1) if values.dim() > 1 else values.reshape(-1, 1)
        if seen[0].numel() != x.numel():
            finite = torch.isfinite(rows)
            smallest = torch.where(finite, rows, torch.inf).amin(1)
            largest = torch.where(finite, rows, -torch.inf).amax(1)
            return (smallest, largest) if bool(finite.any(1).all()) else None
        smallest, largest = torch.aminmax(rows, dim=1)
        return smallest, largest

    def forward(self, x: Tensor) -> Tensor:
        """Widen each channel's range by ``x`` (channels along ``ch_axis``) and return ``x``."""
        extremes = self.channel_extremes(x)
        if extremes is not None:
            self.min_val = torch.minimum(self.min_val, extremes[0])
            self.max_val = torch.maximum(self.max_val, extremes[1])
        return x
