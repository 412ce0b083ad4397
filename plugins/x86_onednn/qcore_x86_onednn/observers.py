"""Weight observers for CPUs without VNNI, where oneDNN's kernels add pairs of products in 16 bits.

Found by experiment (weights of 127 at two places, zeros elsewhere, activations of 255, all pairs of places): kernels
add input channels 2k and 2k + 1 at the same kernel position, in linear layers inputs 2k and 2k + 1. Depthwise kernels
add no pairs.
"""

import torch.nn.functional as F
from torch import Tensor

from qcore.observer import (
    ObserverBase,
    PairLimitedPerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    largest_pair_sum,
)


def input_channel_pairs(weight: Tensor) -> Tensor:
    """A weight (out, in, ...) as the pairs (out, pairs, 2) that the kernels add."""
    rows = weight.reshape(weight.shape[0], weight.shape[1], -1).transpose(1, 2)
    even = F.pad(rows, (0, rows.shape[2] % 2))
    return even.reshape(weight.shape[0], -1, 2)


class SaturationFreePerChannelMinMaxObserver(PairLimitedPerChannelMinMaxObserver):
    """Per-channel weights whose pairs can't saturate in oneDNN's kernels."""

    pairs = staticmethod(input_channel_pairs)


def largest_sum(weight: Tensor) -> int:
    """The largest sum of one sign in any pair of integer weights."""
    return int(largest_pair_sum(input_channel_pairs(weight)).max()) if weight.numel() else 0


def observer_kernels() -> dict[type[ObserverBase], type[ObserverBase]]:
    """What stands in for the core's observers."""
    return {PerChannelMinMaxObserver: SaturationFreePerChannelMinMaxObserver}
