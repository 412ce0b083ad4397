"""Weight observers for CPUs without VNNI, where kernels add pairs of products in 16 bits.

Found by experiment (weights of 127 at two places, zeros elsewhere, activations of 255, all pairs of places): kernels
add input channels 2k and 2k + 1 at the same kernel position, in linear layers inputs 2k and 2k + 1. oneDNN's depthwise
kernels add no pairs. FBGEMM's add positions 2k and 2k + 1 of the kernel, in the order of its elements, and take half
the time where there are many channels.
"""

import torch
import torch.nn.functional as F
from qcore_torch_kernels.pair_limited import PairLimitedPerChannelMinMaxObserver, largest_pair_sum
from torch import Tensor

from qcore.observer import PerChannelMinMaxObserver, StandIns


def input_channel_pairs(weight: Tensor) -> Tensor:
    """A weight (out, in, ...) as the pairs (out, pairs, 2) that the kernels add."""
    rows = weight.reshape(weight.shape[0], weight.shape[1], -1).transpose(1, 2)
    even = F.pad(rows, (0, rows.shape[2] % 2))
    return even.reshape(weight.shape[0], -1, 2)


#: From how many channels FBGEMM's depthwise kernels are faster than oneDNN's.
MANY_CHANNELS = 192
#: How much coarser the weights of a depthwise convolution may become for them, root mean square over the channels.
#: 3 dB at most: of MobileNetV2's those that would lose more cost its logits 1.8 dB, the others nothing.
LARGEST_GROWTH = 1.4


def is_for_depthwise_kernel(weight: Tensor) -> bool:
    """Whether FBGEMM's depthwise kernel would be the faster one for a weight (out, in / groups, ...)."""
    return weight.shape[0] >= MANY_CHANNELS and tuple(weight.shape[1:]) in ((1, 3, 3), (1, 5, 5))


def kernel_position_pairs(weight: Tensor) -> Tensor:
    """A depthwise weight (out, 1, ...) as the pairs (out, pairs, 2) that FBGEMM's kernels add."""
    rows = weight.flatten(1)
    return F.pad(rows, (0, rows.shape[1] % 2)).reshape(weight.shape[0], -1, 2)


def fits_depthwise_kernel(weight: Tensor, input_max: int) -> bool:
    """Whether FBGEMM's depthwise kernel is the faster one for integer weights, and none of its sums can saturate."""
    return (
        is_for_depthwise_kernel(weight)
        and int(largest_pair_sum(kernel_position_pairs(weight)).max()) * input_max <= 2**15 - 1
    )


class SaturationFreePerChannelMinMaxObserver(PairLimitedPerChannelMinMaxObserver):
    """Per-channel weights whose pairs can't saturate in oneDNN's kernels, nor in FBGEMM's if that costs little."""

    @staticmethod
    def pairs(weight: Tensor) -> Tensor:
        """The pairs (out, pairs, 2) of a weight (out, in, ...)."""
        return kernel_position_pairs(weight) if is_for_depthwise_kernel(weight) else input_channel_pairs(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Widen each channel's range by the weight ``x`` and find how much its scale must grow; return ``x``."""
        super().forward(x)
        if is_for_depthwise_kernel(x) and float(self.growth.square().mean().sqrt()) > LARGEST_GROWTH:
            self.growth = torch.ones_like(self.growth)
        return x


def largest_sum(weight: Tensor) -> int:
    """The largest sum of one sign in any pair of integer weights."""
    return int(largest_pair_sum(input_channel_pairs(weight)).max()) if weight.numel() else 0


def stand_ins() -> StandIns:
    """What stands in for the core's observers."""
    return {PerChannelMinMaxObserver: SaturationFreePerChannelMinMaxObserver}
