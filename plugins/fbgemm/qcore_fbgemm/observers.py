"""Weight observers for FBGEMM's kernels, which add pairs of products in 16 bits.

Found by experiment (weights of 127 at two places, zeros elsewhere, activations of 255, all pairs of places): with the
weights of an output channel in the order (kernel positions, input channels), kernels add places 2k and 2k + 1. Without
AVX-512 VNNI that is so for every kernel; with it, for the depthwise ones.
"""

import torch.nn.functional as F
from qcore_torch_kernels.pair_limited import PairLimitedPerChannelMinMaxObserver, largest_pair_sum
from torch import Tensor

from qcore.observer import PerChannelMinMaxObserver, StandIns


def neighbouring_pairs(weight: Tensor) -> Tensor:
    """A weight (out, in, ...) as the pairs (out, pairs, 2) that the kernels add."""
    rows = weight.movedim(1, -1).reshape(weight.shape[0], -1)
    even = F.pad(rows, (0, rows.shape[1] % 2))
    return even.reshape(weight.shape[0], -1, 2)


def no_pairs(weight: Tensor) -> Tensor:
    """Nothing to look at."""
    return weight.new_zeros((weight.shape[0], 1, 2))


class SaturationFreePerChannelMinMaxObserver(PairLimitedPerChannelMinMaxObserver):
    """Per-channel weights whose pairs can't saturate in any kernel."""

    pairs = staticmethod(neighbouring_pairs)


class DepthwiseSaturationFreePerChannelMinMaxObserver(PairLimitedPerChannelMinMaxObserver):
    """Per-channel weights whose pairs can't saturate in a depthwise kernel; other weights are left alone."""

    @staticmethod
    def pairs(weight: Tensor) -> Tensor:
        """The pairs of a depthwise weight (out, 1, ...)."""
        return neighbouring_pairs(weight) if is_depthwise(weight) else no_pairs(weight)


def is_depthwise(weight: Tensor) -> bool:
    """Whether a weight is that of a convolution with one input channel for each output channel."""
    return weight.dim() > 2 and weight.shape[1] == 1


def largest_sum(weight: Tensor) -> int:
    """The largest sum of one sign in any pair of integer weights."""
    return int(largest_pair_sum(neighbouring_pairs(weight)).max()) if weight.numel() else 0


def stand_ins(has_vnni: bool) -> StandIns:
    """What stands in for the core's observers on this CPU."""
    own = DepthwiseSaturationFreePerChannelMinMaxObserver if has_vnni else SaturationFreePerChannelMinMaxObserver
    return {PerChannelMinMaxObserver: own}
