"""The search for the range of least squared quantization error, over many histograms at once.

One vectorised grid search, refined twice, over (low, high) as fractions of the range seen; it knows how many integers
there are and whether the scheme is symmetric. A network has thousands of small tensors whose searches each cost more
for their calls than for their arithmetic, so they are searched together: each histogram is a row, filled up with
values of no weight to one of a few lengths. A row's result doesn't depend on the rows beside it.

Minimising the expected squared error of the quantized value goes back to Sung, Shin and Hwang, "Resiliency of Deep
Neural Networks under Quantization" (2015), and Banner et al., "Post training 4-bit quantization" (2019).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of the error that a cut must save. Less may come from values standing for bins rather than for themselves.
LEAST_GAIN = 0.02

#: Divided by the number of bins that hold anything, the share that a cut must save if that is more. The fewer they are,
#: the likelier is a range for which just their middles, but not the values themselves, lie next to integers.
FEW_VALUES = 4.0

#: Rows have a multiple of this many values.
_ROW_STEP = 64

#: Numbers that are worked on at a time: such blocks stay in the cache.
_BLOCK = 1 << 17


@dataclass(frozen=True, eq=False)
class Histogram:
    """What an observer saw.

    Attributes:
        counts: how many values (N,), float64.
        values: the values (N,), float64.
        low: the lower end of the whole range, which holds zero.
        high: the upper end of the whole range, which holds zero.
    """

    counts: Tensor
    values: Tensor
    low: float
    high: float


def ranges_of_least_error(
    histograms: Sequence[Histogram], integers: tuple[int, int], middle: int | None
) -> list[tuple[float, float]]:
    """For each histogram, the range whose quantization has the least squared error over it.

    The whole range is always a candidate and wins near ties, so that data of one or two values, or of few, keep it.

    Args:
        histograms: on the CPU.
        integers: smallest and largest integer.
        middle: the zero point of a symmetric scheme; ``None`` for an affine one.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``, in the order of the histograms.
    """
    ranges = [(histogram.low, histogram.high) for histogram in histograms]
    alike: dict[tuple[int, bool], list[int]] = {}
    for number, histogram in enumerate(histograms):
        low, high = ranges[number]
        if low != high and histogram.values.numel() > 2:
            columns = -(-histogram.values.numel() // _ROW_STEP) * _ROW_STEP
            alike.setdefault((columns, low < 0 < high and middle is None), []).append(number)
    for (columns, two_sided), members in alike.items():
        rows = max(1, _BLOCK // columns)
        for start in range(0, len(members), rows):
            some = members[start : start + rows]
            search = _Search([histograms[number] for number in some], columns, integers, middle)
            for number, found in zip(some, search.run(two_sided), strict=True):
                ranges[number] = found
    return ranges


class _Search:
    """One search over histograms in rows of one length."""

    def __init__(
        self, histograms: Sequence[Histogram], columns: int, integers: tuple[int, int], middle: int | None
    ) -> None:
        self.integers = integers
        self.middle = middle
        self.points = torch.zeros(len(histograms), columns, dtype=torch.float32)
        self.weights = torch.zeros(len(histograms), columns, dtype=torch.float32)
        # In units of the largest value, squares in float32 neither overflow nor vanish.
        norms = [max(-histogram.low, histogram.high) for histogram in histograms]
        for row, (histogram, norm) in enumerate(zip(histograms, norms, strict=True)):
            number = histogram.values.numel()
            self.points[row, :number] = histogram.values / norm
            self.weights[row, :number] = histogram.counts / histogram.counts.sum()
        self.norms = torch.tensor(norms, dtype=torch.float64)[:, None]
        ends = [[histogram.low, histogram.high] for histogram in histograms]
        self.ends = torch.tensor(ends, dtype=torch.float64) / self.norms
        numbers = torch.tensor([float(histogram.values.numel()) for histogram in histograms], dtype=torch.float64)
        self.least_gain = (FEW_VALUES / numbers).clamp_min(LEAST_GAIN)

    def run(self, two_sided: bool) -> list[tuple[float, float]]:
        """The ranges, in the order of the rows."""
        coarse = 16 if two_sided else 64
        step = 1.0 / coarse
        offsets = (torch.arange(1, coarse + 1, dtype=torch.float64) * step).expand(1, 2, coarse)
        fine = torch.linspace(-1, 1, 7 if two_sided else 33, dtype=torch.float64)
        best = torch.ones_like(self.ends)
        whole = least = best[:, 0]
        for turn in range(3 if two_sided else 2):
            cuts = offsets
            if two_sided:  # Each of the low ends with each of the high ones.
                pairs = torch.broadcast_tensors(offsets[:, 0, :, None], offsets[:, 1, None, :])
                cuts = torch.stack(pairs, 1).flatten(2)
            errors = self.squared_errors(cuts)
            index = errors.argmin(1, keepdim=True)
            found = errors.gather(1, index)[:, 0].double()
            if turn == 0:
                whole = least = errors[:, -1].double()  # The last of the coarse cuts cuts nothing.
            better = found < least
            least = torch.where(better, found, least)
            chosen = cuts.expand(len(errors), -1, -1).gather(2, index[:, None].expand(-1, 2, -1))[:, :, 0]
            best = torch.where(better[:, None], chosen, best)
            offsets = (best[:, :, None] + fine * step).clamp(1e-4, 1)
            step /= (len(fine) - 1) / 2
        pays = least <= whole * (1 - self.least_gain)
        ends = self.ends * torch.where(pays[:, None], best, 1.0) * self.norms
        return [(low, high) for low, high in ends.tolist()]

    def squared_errors(self, cuts: Tensor) -> Tensor:
        """Mean squared error (rows, K) of quantizing each row with each range, its ends cut by (rows or 1, 2, K)."""
        quant_min, quant_max = self.integers
        low, high = (self.ends[:, :, None] * cuts).unbind(1)
        tiny = torch.finfo(torch.float32).tiny
        if self.middle is not None:
            scale = (torch.maximum(-low, high) / ((quant_max - quant_min) / 2)).clamp_min(tiny)
            zero_point = torch.full_like(scale, self.middle)
        else:
            scale = ((high - low) / (quant_max - quant_min)).clamp_min(tiny)
            zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
        scale = scale.float()
        least, most = (quant_min - zero_point).float(), (quant_max - zero_point).float()
        errors = torch.empty(scale.shape, dtype=torch.float32)
        # Several whole rows of candidates at a time where they are short, else some candidates of one row.
        columns, candidates = self.points.shape[1], scale.shape[1]
        some = min(candidates, max(1, _BLOCK // columns))
        rows = max(1, _BLOCK // (columns * some))
        for row in range(0, len(scale), rows):
            points = self.points[row : row + rows, None]
            weights = self.weights[row : row + rows, None]
            for first in range(0, candidates, some):
                block = (slice(row, row + rows), slice(first, first + some))
                column = scale[block][:, :, None]
                steps = (points / column).round_()
                # Torch's clamp between tensors takes six times as long as both of these.
                torch.maximum(steps, least[block][:, :, None], out=steps)
                torch.minimum(steps, most[block][:, :, None], out=steps)
                # Not a product of matrices, whose last bits depend on how many rows it has.
                errors[block] = steps.mul_(column).sub_(points).square_().mul_(weights).sum(2)
        return errors
