"""Histograms: every value is counted once, wherever it lies and however the ranges of the batches grow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore import (
    HistogramObserver,
)
from qcore.errors import ConfigError
from qcore.observer.histogram import LARGEST_SAMPLE, LEAST_SAMPLE, WHOLE_LIMIT, sampling_stride
from tests.observer.helpers import qparams, seen


def test_the_layout_in_memory_does_not_matter():
    x = torch.randn(2, 3, 40, 50)
    plain, last = seen(HistogramObserver(), x), seen(HistogramObserver(), x.to(memory_format=torch.channels_last))
    assert qparams(plain) == qparams(last)


def test_of_a_large_tensor_a_part_stands_for_all():
    torch.manual_seed(0)
    x = torch.randn(3_000_000)
    observer = seen(HistogramObserver(), x)
    assert observer.histogram.sum() == pytest.approx(x.numel(), rel=1e-4)
    assert observer.max_val == x.max()


@given(count=st.integers(0, 1 << 28))
def test_a_sample_is_neither_small_nor_large_and_in_step_with_no_size(count):
    stride = sampling_stride(count)
    if count <= WHOLE_LIMIT:
        assert stride == 1
    else:
        assert math.gcd(stride, count) == 1
        # The next number without a common divisor may be far away: 13 after 2, for multiples of 2310.
        assert LEAST_SAMPLE / 6 <= count / stride <= 2 * LARGEST_SAMPLE


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    exponents=st.lists(st.sampled_from([-100, -30, -3, 0, 1, 2, 30, 100]), min_size=1, max_size=4),
    shift=st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]),
    bins=st.sampled_from([8, 100, 2048]),
)
def test_every_value_is_counted_once_whatever_the_ranges_of_the_batches(seed, exponents, shift, bins):
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.rand(50, generator=generator) - 0.5 + shift) * 2.0**exponent for exponent in exponents]
    observer = seen(HistogramObserver(bins=bins), *batches)
    assert observer.histogram.sum() == 50 * len(batches)
    assert (observer.min_val, observer.max_val) == (torch.cat(batches).min(), torch.cat(batches).max())
    # Of the two ends of a bin, one may be the neighbour's by rounding.
    width = 2.0 ** observer.exponent.item()
    expected = torch.floor(torch.cat(batches).double() / width).sub(observer.first_bin).long()
    found = torch.arange(bins).repeat_interleave(observer.histogram.long())
    assert ((found - expected.sort().values).abs() <= 1).all()


def test_a_histogram_takes_no_memory_before_any_data_and_loads_with_it():
    fresh, used = HistogramObserver(bins=64), HistogramObserver(bins=64)
    assert fresh.histogram.numel() == 0
    assert not fresh.has_data
    with torch.inference_mode():
        used(torch.linspace(-1, 2, 100))
    used(torch.linspace(-1, 3, 100))
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(fresh.histogram, used.histogram) and fresh.histogram.sum() == 200
    assert fresh.calculate_qparams() == used.calculate_qparams()
    fresh(torch.linspace(-1, 2, 100))
    assert fresh.histogram.sum() == 300
    used.load_state_dict(HistogramObserver(bins=64).state_dict())
    assert not used.has_data
    used(torch.ones(3))
    assert used.histogram.sum() == 3
    with pytest.raises(ConfigError, match="has 64 bins in the state_dict, and 32 here"):
        HistogramObserver(bins=32).load_state_dict(fresh.state_dict())
