"""The smallest and the largest value ever seen, for the whole tensor or for each channel."""

from typing import Any, Literal

import torch
from torch import Tensor

from qcore.dtypes import QScheme, checked_integer
from qcore.errors import ConfigError
from qcore.observer.base import RangeObserver

#: Numbers of a weight that are rounded at a time: it takes several times their memory.
_BLOCK = 1 << 18


class MinMaxObserver(RangeObserver):
    """Running minimum and maximum of the whole tensor.

    Args:
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Widen the range by ``x`` (any shape, floating dtype) and return ``x``."""
        seen = self.finite(x)
        # Most tensors widen nothing, and to ask numbers costs less than to make tensors of them.
        if seen is not None and not (self.min_val.item() <= seen[1] and seen[2] <= self.max_val.item()):
            self.update(*self.min_val.new_tensor(seen[1:]))
        return x


class PerChannelMinMaxObserver(RangeObserver):
    """Running minimum and maximum of each slice along one axis.

    Args:
        ch_axis: the axis; 0 is the output channel of a convolution's or a linear's weight.
        qscheme: a per-channel scheme.
        rounding: how a weight is rounded: ``"nearest"``; or ``"sum_preserving"``, which then moves the values nearest
            to the middle between two steps to the other side until each channel's errors add up to less than half a
            step. A constant input then gives the same output as before, which takes most of the bias from a
            quantized convolution behind a ReLU.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.
    """

    ch_axis: int
    treats_channels_apart = True

    def __init__(
        self,
        ch_axis: int = 0,
        qscheme: object = QScheme.per_channel_affine,
        rounding: Literal["nearest", "sum_preserving"] = "nearest",
        **arguments: Any,
    ) -> None:
        super().__init__(qscheme=qscheme, **arguments)
        self.ch_axis = checked_integer(ch_axis, f"{type(self).__name__}: ch_axis")
        if rounding not in ("nearest", "sum_preserving"):
            raise ConfigError(
                f'{type(self).__name__}: rounding must be "nearest" or "sum_preserving", found {rounding!r}'
            )
        self.rounding = rounding

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest finite value of each channel of ``x``; ``None`` if no channel has any.

        A channel that has none by itself gets ``inf`` and ``-inf``, as before any data.
        """
        if x.numel() == 0:
            return None
        values = x.detach().to(torch.float32)
        rows = values.movedim(self.ch_axis, 0).flatten(1) if values.dim() > 1 else values.reshape(-1, 1)
        smallest, largest = rows.amin(1), rows.amax(1)  # Together ten times as fast as aminmax is along an axis.
        if torch.isfinite(smallest + largest).all():
            return smallest, largest
        finite = torch.isfinite(rows)
        self.nonfinite += rows.numel() - int(finite.sum())
        if not finite.any():
            return None
        return torch.where(finite, rows, torch.inf).amin(1), torch.where(finite, rows, -torch.inf).amax(1)

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` as integers with one scale for each channel, rounded as ``rounding`` says."""
        if self.rounding == "nearest":
            return super().quantize(x)
        scale, zero_point = self.calculate_qparams()
        rows = x.movedim(self.ch_axis, 0)
        rounded = torch.empty(rows.shape, dtype=self.dtype, device=x.device)
        some = max(1, _BLOCK // max(1, rows[:1].numel()))
        for first in range(0, len(rows), some):
            block = slice(first, first + some)
            steps = rows[block].flatten(1) / scale[block, None] + zero_point[block, None]
            whole = sum_preserving_round(steps, self.quant_min, self.quant_max)
            rounded[block] = whole.reshape(rounded[block].shape).to(self.dtype)
        return rounded.movedim(0, self.ch_axis)


def sum_preserving_round(steps: Tensor, low: int, high: int) -> Tensor:
    """Round each row so that its rounding errors add up to at most half a step, and each is below one step.

    Of all such roundings, the one that moves the fewest values, and those that cost least.

    Args:
        steps: float values (rows, columns).
        low: smallest integer allowed.
        high: largest integer allowed.

    Returns:
        Integers as floats, of the same shape.
    """
    rounded = torch.round(steps).clamp_(low, high)
    errors = rounded - steps
    total = errors.sum(1)
    direction = total.sign()[:, None]
    count = total.abs().round_()[:, None]
    most = min(int(count.max()), steps.shape[1]) if count.numel() else 0
    if not most:
        return rounded
    # Only a value rounded in the direction of the row's error may move: the others would err by more than a step.
    at_end = rounded == torch.where(direction > 0, low, high)
    cost, place = errors.mul_(direction).masked_fill_(at_end, 0.0).topk(most, 1)
    moves = (torch.arange(most, device=steps.device) < count) & (cost > 0)
    return rounded.scatter_add_(1, place, -direction * moves)
