"""Weights for kernels that add pairs of products in 16 bits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore_torch_kernels.pair_limited import PAIR_LIMIT, PairLimitedPerChannelMinMaxObserver, largest_pair_sum

from qcore import QScheme


class Neighbours(PairLimitedPerChannelMinMaxObserver):
    @staticmethod
    def pairs(weight):
        return weight.reshape(weight.shape[0], -1, 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rounding=st.sampled_from(["nearest", "sum_preserving"]))
def test_no_pair_of_weights_exceeds_the_limit_and_quiet_channels_are_left_alone(seed, rounding):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 12, generator=generator)
    weight[0] = torch.tensor([1.0, -1.0] * 6)  # Products of two signs don't pile up.
    weight[1] = 1.0
    arguments = {"dtype": torch.int8, "qscheme": QScheme.per_channel_symmetric, "rounding": rounding}
    limited = Neighbours(**arguments)
    limited(weight)
    assert (largest_pair_sum(Neighbours.pairs(limited.quantize(weight))) <= PAIR_LIMIT).all()
    assert limited.growth[0] == 1.0
    assert 1.9 < limited.growth[1] < 2.1
    assert (limited.growth <= 2.1).all()
