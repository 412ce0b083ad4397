"""The order and the form of two factors."""

import pytest
import torch
from qcore_torch_kernels.broadcast import factors


@pytest.mark.parametrize(
    ("channels", "is_repeated"),
    [(3, True), (64, False), (72, True), (120, True), (480, True), (672, False), (960, False)],
)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_scale_for_each_channel_comes_second_and_is_repeated_where_rests_are_large(channels, is_repeated, is_swapped):
    x = torch.randint(9, (2, channels, 3, 2)).to(memory_format=torch.channels_last)
    scale = torch.randint(9, (2, channels, 1, 1))
    large, small = factors(scale, x) if is_swapped else factors(x, scale)
    assert large is x
    assert small.shape == (x.shape if is_repeated else scale.shape)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(large * small, x * scale)


@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (5, 1, 1), (1, 5, 1, 1), (2, 1, 3, 2), ()], ids=str)
def test_other_factors_stay_as_they_are(shape):
    x, other = torch.zeros(2, 5, 3, 2), torch.zeros(shape)
    large, small = factors(x, other)
    assert large is x and small is other
