"""The clipping range that loses least: a histogram of what came by, and a search for the range of least squared error.

The bins lie on a grid anchored at zero whose width is a power of two. When values outgrow the bins, the width doubles
and bins merge by pairs, exactly: no value is ever guessed anew, unlike in torch's HistogramObserver. The search for
the range is one vectorised grid search, refined twice, over (low, high) as fractions of the range seen; it knows how
many integers there are and whether the scheme is symmetric.

Minimising the expected squared error of the quantized value goes back to Sung, Shin and Hwang, "Resiliency of Deep
Neural Networks under Quantization" (2015), and Banner et al., "Post training 4-bit quantization" (2019).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcore.observer.base import RangeObserver, qparams_from_range, symmetric_zero_point

#: Up to how many values all of a tensor enter its histogram. Of a larger one every n-th value does and counts n times:
#: ``SAMPLE_SHARE`` of them, but at least ``LEAST_SAMPLE`` and at most ``LARGEST_SAMPLE``.
WHOLE_LIMIT = 1 << 14
LEAST_SAMPLE = 1 << 12
LARGEST_SAMPLE = 1 << 16
SAMPLE_SHARE = 32

#: Share of the error that a cut must save. Less may come from values standing for bins rather than for themselves.
LEAST_GAIN = 0.02

#: Divided by the number of bins that hold anything, the share that a cut must save if that is more. The fewer they are,
#: the likelier is a range for which just their middles, but not the values themselves, lie next to integers.
FEW_VALUES = 4.0


class _Grid(NamedTuple):
    """What an observer's buffers say, as Python's numbers, which are there without asking a device."""

    smallest: float
    largest: float
    first_bin: int
    per_width: float


class HistogramObserver(RangeObserver):
    """Keeps a histogram and gives the range of least squared quantization error.

    Args:
        bins: number of bins.
        arguments: see :class:`~qcore.observer.base.ObserverBase`.

    Attributes:
        histogram: number of values in each bin (float64).
        first_bin: index on the grid of the first bin: it begins at ``first_bin * 2**exponent``.
        exponent: logarithm to base 2 of the bins' width.
    """

    histogram: Tensor
    first_bin: Tensor
    exponent: Tensor

    def __init__(self, bins: int = 2048, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("first_bin", torch.tensor(0))
        self.register_buffer("exponent", torch.tensor(0))
        self._chosen: tuple[Tensor, Tensor] | None
        self._grid: _Grid | None
        self._forget()

    def _forget(self) -> None:
        self._chosen = self._grid = None

    def forward(self, x: Tensor) -> Tensor:
        """Count the values of ``x`` (any shape, floating dtype) and return ``x``."""
        seen = self.finite(x)
        if seen is None:
            return x
        values, smallest, largest = seen
        vars(self)["_chosen"] = None  # Past nn.Module's __setattr__, which is slow.
        grid = self._grid
        if grid is None or smallest < grid.smallest or largest > grid.largest:
            self.widen(smallest, largest)
            self._fit_grid()
            grid = self._grid = self._read_grid()
        stride = sampling_stride(values.numel())
        if stride > 1:
            values = values[::stride]
        # values / width - first_bin, in one pass. (torch.floor would wake other threads for as little as 2,048 values.)
        bins = torch.rsub(values, -grid.first_bin, alpha=-grid.per_width).to(torch.int32)
        self.histogram.add_(torch.bincount(bins, minlength=self.bins), alpha=stride)
        return x

    def _read_grid(self) -> "_Grid":
        per_width = math.ldexp(1.0, -int(self.exponent))
        return _Grid(float(self.min_val), float(self.max_val), int(self.first_bin), per_width)

    def _fit_grid(self) -> None:
        """Double the bins' width until all values seen lie on the grid, and merge the bins."""
        low, high = min(float(self.min_val), 0.0), max(float(self.max_val), 0.0)
        exponent = max(math.frexp((high - low) / self.bins)[1] - 1, -126)
        # One bin stays free, as a value just below the end of the last one may be rounded up.
        while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= self.bins - 1:
            exponent += 1
        old_exponent, old_first = int(self.exponent), int(self.first_bin)
        is_empty = self._grid is None and not bool(self.histogram.any())
        if not is_empty:
            exponent = max(exponent, old_exponent)
        first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
        if not is_empty:
            if exponent == old_exponent and old_first <= first and last < old_first + self.bins - 1:
                return
            used = self.histogram.nonzero().flatten()
            # An arithmetic shift is a floor division, for bins below zero, too.
            moved = (used + old_first) >> min(exponent - old_exponent, 62)
            merged = torch.zeros_like(self.histogram)
            merged.index_add_(0, (moved - first).clamp_(0, self.bins - 1), self.histogram[used])
            self.histogram.copy_(merged)
        self.exponent.fill_(exponent)
        self.first_bin.fill_(first)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the range of least squared error; computed once for what was seen."""
        if self._chosen is None:
            counts, values = self._points()
            integers = (self.quant_min, self.quant_max)
            low, high = range_of_least_error(
                counts,
                values,
                (float(self.min_val), float(self.max_val)),
                integers,
                symmetric_zero_point(self.dtype, *integers) if self.qscheme.symmetric else None,
            )
            arguments = (*integers, self.dtype, self.qscheme, self.eps)
            self._chosen = qparams_from_range(torch.tensor(low), torch.tensor(high), *arguments)
        return self._chosen

    def _points(self) -> tuple[Tensor, Tensor]:
        """The counts of the bins that hold anything, and a value that stands for each."""
        smallest, largest = float(self.min_val), float(self.max_val)
        width = math.ldexp(1.0, int(self.exponent))
        values = (torch.arange(self.bins, dtype=torch.float64) + int(self.first_bin) + 0.5) * width
        used = self.histogram > 0
        counts, values = self.histogram[used].cpu(), values[used.cpu()]
        # The bin next to zero of a tensor without a sign holds above all the zeros of a ReLU, which cost nothing.
        if smallest >= 0:
            values[values < width] = 0.0
        elif largest <= 0:
            values[values > -width] = 0.0
        values.clamp_(smallest, largest)
        if values.numel() == 1:
            values[0] = largest if abs(largest) >= abs(smallest) else smallest
        return counts, values

    def reset_min_max_vals(self) -> None:
        """Forget what was seen."""
        super().reset_min_max_vals()
        self.histogram.zero_()
        self._forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()


def sampling_stride(count: int) -> int:
    """Of ``count`` values, every how many-th enters the histogram."""
    if count <= WHOLE_LIMIT:
        return 1
    stride = max(min(count // LEAST_SAMPLE, SAMPLE_SHARE), count // LARGEST_SAMPLE)
    # Without a common divisor it falls in step with no size of the tensor, be it channels, rows or columns.
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def range_of_least_error(
    counts: Tensor,
    values: Tensor,
    seen: tuple[float, float],
    integers: tuple[int, int],
    middle: int | None,
) -> tuple[float, float]:
    """The range whose quantization has the least squared error over a histogram.

    The whole range is always a candidate and wins near ties, so that data of one or two values, or of few, keep it.

    Args:
        counts: how many values (N,), float64.
        values: the values (N,), float64.
        seen: smallest and largest value.
        integers: smallest and largest integer.
        middle: the zero point of a symmetric scheme; ``None`` for an affine one.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``.
    """
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    if low == high or values.numel() <= 2:
        return low, high
    norm = max(-low, high)  # In units of the largest value, squares in float32 neither overflow nor vanish.
    points, weights = (values / norm).float(), (counts / counts.sum()).float()
    low, high = low / norm, high / norm
    two_sided = low < 0 < high and middle is None

    def errors(cut_low: Tensor, cut_high: Tensor) -> Tensor:
        return _squared_errors(points, weights, low * cut_low, high * cut_high, integers, middle)

    one = torch.ones(1, dtype=torch.float64)
    whole = float(errors(one, one))
    least, best_low, best_high = whole, 1.0, 1.0
    coarse = 16 if two_sided else 64
    step = 1.0 / coarse
    offsets_low = offsets_high = torch.arange(1, coarse + 1, dtype=torch.float64) * step
    fine = torch.linspace(-1, 1, 7 if two_sided else 33, dtype=torch.float64)
    for _ in range(3 if two_sided else 2):
        if two_sided:
            cut_low, cut_high = (grid.flatten() for grid in torch.meshgrid(offsets_low, offsets_high, indexing="ij"))
        else:
            cut_low = cut_high = offsets_low
        found = errors(cut_low, cut_high)
        index = int(found.argmin())
        if float(found[index]) < least:
            least, best_low, best_high = float(found[index]), float(cut_low[index]), float(cut_high[index])
        offsets_low = (best_low + fine * step).clamp(1e-4, 1)
        offsets_high = (best_high + fine * step).clamp(1e-4, 1)
        step /= (len(fine) - 1) / 2
    if least > whole * (1 - max(LEAST_GAIN, FEW_VALUES / values.numel())):
        best_low = best_high = 1.0
    return low * best_low * norm, high * best_high * norm


def _squared_errors(
    points: Tensor, weights: Tensor, low: Tensor, high: Tensor, integers: tuple[int, int], middle: int | None
) -> Tensor:
    """Mean squared error of quantizing ``points`` (N,) with each of the ranges (K,)."""
    quant_min, quant_max = integers
    tiny = torch.finfo(torch.float32).tiny
    if middle is not None:
        scale = (torch.maximum(-low, high) / ((quant_max - quant_min) / 2)).clamp_min(tiny)
        zero_point = torch.full_like(scale, middle)
    else:
        scale = ((high - low) / (quant_max - quant_min)).clamp_min(tiny)
        zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    found = []
    rows = max(1, (1 << 18) // points.numel())  # Blocks that stay in the cache.
    for some_scale, some_zero in zip(scale.float().split(rows), zero_point.float().split(rows), strict=True):
        column, zero = some_scale[:, None], some_zero[:, None]
        steps = (points / column).round_()
        steps = torch.minimum(torch.maximum(steps, quant_min - zero), quant_max - zero)
        found.append(steps.mul_(column).sub_(points).square_() @ weights)
    return torch.cat(found)
