"""The clipping range that loses least: a histogram of what came by, and a search for the range of least squared error.

The bins lie on a grid anchored at zero whose width is a power of two. When values outgrow the bins, the width doubles
and bins merge by pairs, exactly: no value is ever guessed anew, unlike in torch's HistogramObserver. The search for
the range is in ``range_search.py``.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcore.dtypes import checked_integer
from qcore.errors import ConfigError
from qcore.observer.base import ObserverBase, RangeObserver, qparams_from_range, symmetric_zero_point
from qcore.observer.range_search import Histogram, ranges_of_least_error

#: Up to how many values all of a tensor enter its histogram. Of a larger one every n-th value does and counts n times:
#: ``SAMPLE_SHARE`` of them, but at least ``LEAST_SAMPLE`` and at most ``LARGEST_SAMPLE``.
WHOLE_LIMIT = 1 << 14
LEAST_SAMPLE = 1 << 13
LARGEST_SAMPLE = 1 << 16
SAMPLE_SHARE = 32

#: Observers whose ranges are searched together.
_TOGETHER = 256

#: A tensor with a smaller range has qparams that a range beside it would change: they aren't computed together.
_LEAST_RANGE = 1e-30


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
        histogram: number of values in each bin (float64); empty before any data.
        first_bin: index on the grid of the first bin: it begins at ``first_bin * 2**exponent``.
        exponent: logarithm to base 2 of the bins' width.
    """

    histogram: Tensor
    first_bin: Tensor
    exponent: Tensor
    bins: int
    _chosen: tuple[Tensor, Tensor] | None
    _grid: _Grid | None

    def __init__(self, bins: int = 2048, **arguments: Any) -> None:
        super().__init__(**arguments)
        if checked_integer(bins, "HistogramObserver: bins") < 2:
            raise ConfigError(f"HistogramObserver: bins must be 2 at least, found {bins}")
        vars(self).update(bins=bins, _chosen=None, _grid=None)
        self._buffers.update(
            histogram=torch.zeros(0, dtype=torch.float64), first_bin=torch.tensor(0), exponent=torch.tensor(0)
        )

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
            self.update(*self.min_val.new_tensor((smallest, largest)))
            self._fit_grid()
            ends, width = (float(self.min_val), float(self.max_val)), math.ldexp(1.0, -int(self.exponent))
            grid = self._grid = _Grid(*ends, int(self.first_bin), width)
        stride = sampling_stride(values.numel())
        if stride > 1:
            values = values[::stride]
        # values / width - first_bin, in one pass. (torch.floor would wake other threads for as little as 2,048 values.)
        bins = torch.rsub(values, -grid.first_bin, alpha=-grid.per_width).to(torch.int32)
        self.histogram.add_(torch.bincount(bins, minlength=self.bins), alpha=stride)
        return x

    def _fit_grid(self) -> None:
        """Double the bins' width until all values seen lie on the grid, and merge the bins."""
        if not self.histogram.numel():  # Bins that may never be needed take no memory.
            self.histogram.resize_(self.bins).zero_()
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
            _choose([self])
        assert self._chosen is not None
        return self._chosen

    @classmethod
    def calculate_all(cls, observers: Sequence[ObserverBase]) -> list[tuple[Tensor, Tensor]]:
        """The qparams of several observers, whose searches are made together."""
        undecided = [o for o in observers if isinstance(o, HistogramObserver) and o._chosen is None and o.has_data]
        for start in range(0, len(undecided), _TOGETHER):  # Not all at once: each histogram is copied.
            _choose(undecided[start : start + _TOGETHER])
        return super().calculate_all(observers)

    def seen(self) -> Histogram:
        """The bins that hold anything, and a value that stands for each."""
        smallest, largest = float(self.min_val), float(self.max_val)
        width = math.ldexp(1.0, int(self.exponent))
        used = self.histogram.nonzero().flatten()
        counts = self.histogram[used].cpu()
        values = (used.cpu() + (int(self.first_bin) + 0.5)).to(torch.float64).mul_(width)
        # The bin next to zero of a tensor without a sign holds above all the zeros of a ReLU, which cost nothing.
        if smallest >= 0:
            values.masked_fill_(values < width, 0.0)
        elif largest <= 0:
            values.masked_fill_(values > -width, 0.0)
        values.clamp_(smallest, largest)
        if values.numel() == 1:
            values[0] = largest if abs(largest) >= abs(smallest) else smallest
        return Histogram(counts, values, min(smallest, 0.0), max(largest, 0.0))

    def reset_min_max_vals(self) -> None:
        """Forget what was seen."""
        super().reset_min_max_vals()
        self.histogram.zero_()
        self._forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        counts = state_dict.get(f"{prefix}histogram")
        if counts is not None and counts.numel() not in (0, self.bins):
            raise ConfigError(f"{prefix}histogram has {counts.numel()} bins in the state_dict, and {self.bins} here")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()


@cache
def sampling_stride(count: int) -> int:
    """Of ``count`` values, every how many-th enters the histogram."""
    if count <= WHOLE_LIMIT:
        return 1
    stride = max(min(count // LEAST_SAMPLE, SAMPLE_SHARE), count // LARGEST_SAMPLE)
    # Without a common divisor it falls in step with no size of the tensor, be it channels, rows or columns.
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _choose(observers: Sequence[HistogramObserver]) -> None:
    """Let observers choose their ranges; those of one scheme and one range of integers are searched together."""
    alike: dict[tuple[Any, ...], list[HistogramObserver]] = {}
    for observer in observers:
        key = (observer.quant_min, observer.quant_max, observer.dtype, observer.qscheme, observer.eps)
        alike.setdefault(key, []).append(observer)
    for (quant_min, quant_max, dtype, qscheme, eps), members in alike.items():
        middle = symmetric_zero_point(dtype, quant_min, quant_max) if qscheme.symmetric else None
        ranges = ranges_of_least_error([observer.seen() for observer in members], (quant_min, quant_max), middle)
        arguments = (quant_min, quant_max, dtype, qscheme, eps)
        usual = [number for number, (low, high) in enumerate(ranges) if max(-low, high) > _LEAST_RANGE]
        unusual = [[number] for number in range(len(members)) if number not in set(usual)]
        for numbers in (usual, *unusual):
            ends = torch.tensor([ranges[number] for number in numbers], dtype=torch.float32).reshape(-1, 2)
            found = qparams_from_range(ends[:, 0], ends[:, 1], *arguments)
            for number, scale, zero_point in zip(numbers, *found, strict=True):
                members[number]._chosen = scale.clone(), zero_point.clone()  # A part of a tensor would keep all of it.
