"""Weights for kernels that add pairs of uint8 x int8 products in 16 bits, as some CPUs do.

``vpmaddubsw`` multiplies unsigned by signed bytes and adds neighbouring products into int16, saturating: two weights
of 127 under activations of 255 lose half their sum. It stays exact as long as, of any pair that a kernel adds, the
positive weights add up to at most 128 and the negative ones to at least -128. On EfficientNet-Lite0 and MobileNetV2
four of five channels need a larger scale for that, by a factor of 1.3 to 1.5 on average, which is less than a bit.
"""

from typing import Any

import torch
from torch import Tensor

from qcore.errors import BackendUnavailableError
from qcore.lowering import Declined
from qcore.observer.min_max import PerChannelMinMaxObserver

#: What the weights of a pair may add up to under activations of up to 255: 255 * 128 < 2**15.
PAIR_LIMIT = 128


#: A rule's answer to weights whose sums could saturate.
SATURATES = Declined("weights could saturate in 16 bits on this CPU; use a PerChannelMinMaxObserver for them")


def could_saturate(largest: int, input_max: int) -> bool:
    """Whether a pair's products could leave 16 bits.

    Args:
        largest: what the weights of a pair add up to at most.
        input_max: the largest integer that the activation takes.
    """
    return largest * input_max > 2**15 - 1


def saturation_error(weight: Tensor) -> BackendUnavailableError:
    """What to raise for a weight that was loaded into a kernel, where a rule would have declined it."""
    return BackendUnavailableError(
        f"a weight of shape {tuple(weight.shape)} was loaded whose sums could saturate in 16 bits on this CPU; "
        "prepare and convert the model that it comes from here, or run its reference model"
    )


def largest_pair_sum(pairs: Tensor) -> Tensor:
    """The largest that the weights of one sign in a pair add up to, in each channel.

    Args:
        pairs: integer weights (channels, pairs, 2), filled up with zeros.

    Returns:
        Positive sums (channels,).
    """
    first, second = pairs.to(torch.int16).unbind(2)
    positive = (first.clamp(min=0) + second.clamp(min=0)).amax(1)
    negative = (first.clamp(max=0) + second.clamp(max=0)).amin(1)
    return torch.maximum(positive, -negative)


class PairLimitedPerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Enlarges the scale of just those channels in which a pair could saturate, by as little as suffices.

    A backend's subclass says with :meth:`pairs` which weights its kernels add in pairs.

    Args:
        arguments: see :class:`~qcore.observer.min_max.PerChannelMinMaxObserver`.

    Attributes:
        growth: the factor of each channel's scale.
    """

    growth: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("growth", torch.ones((), dtype=torch.float32))

    @staticmethod
    def pairs(weight: Tensor) -> Tensor:
        """The weights (out, in, ...) as the pairs that the kernels add: (out, pairs, 2), filled up with zeros."""
        raise NotImplementedError("a backend's subclass must say which weights its kernels add in pairs")

    def forward(self, x: Tensor) -> Tensor:
        """Widen each channel's range by the weight ``x`` and find how much its scale must grow; return ``x``."""
        super().forward(x)
        if x.numel() == 0 or not self.has_data or self.nonfinite_count:
            return x  # Nothing to look at, or what no weight may hold.
        self.growth = torch.ones_like(self.max_val)
        for _ in range(100):
            worst = largest_pair_sum(self.pairs(self.quantize(x.detach())))
            excess = worst.to(torch.float32) / PAIR_LIMIT
            if bool((excess <= 1).all()):
                break
            # What rounding adds to a pair falls off in a few small steps.
            self.growth = torch.where(excess > 1, self.growth * torch.clamp(excess, min=1.002), self.growth)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale, grown where it must be, and zero point for each channel."""
        scale, zero_point = super().calculate_qparams()
        return scale * self.growth, zero_point
