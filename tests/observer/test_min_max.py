"""Minima and maxima, of a whole tensor and of its channels, and the rounding of weights by them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore import (
    MinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    QScheme,
)
from qcore.observer.min_max import sum_preserving_round
from tests.observer.helpers import qparams, seen


def f32(value):
    return torch.tensor(value, dtype=torch.float32).item()


X = torch.tensor([-1.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("arguments", "scale", "zero_point"),
    [
        ({}, f32(4.0) / f32(255.0), 64),
        ({"reduce_range": True}, 4.0 / 127, 32),
        ({"dtype": torch.int8}, 4.0 / 255, -64),
        ({"dtype": torch.int8, "qscheme": QScheme.per_tensor_symmetric}, 3.0 / 127.5, 0),
        ({"qscheme": QScheme.per_tensor_symmetric}, 3.0 / 127.5, 128),
        ({"quant_min": 0, "quant_max": 127, "qscheme": QScheme.per_tensor_symmetric}, 3.0 / 63.5, 63),
        ({"quant_min": 0, "quant_max": 15}, 4.0 / 15, 4),
        ({"dtype": torch.int8, "quant_min": -127, "quant_max": 127}, 4.0 / 254, -63),
        ({"eps": 0.1}, 0.1, 10),
    ],
)
def test_min_max_gives_torch_s_qparams(arguments, scale, zero_point):
    found = qparams(seen(MinMaxObserver(**arguments), X[:1], X[1:]))
    assert found == (pytest.approx(scale, rel=1e-7), zero_point)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_those_of_the_axis(axis):
    x = torch.randn(3, 4, 5)
    observer = seen(PerChannelMinMaxObserver(ch_axis=axis), x[:, :2], x) if axis == 2 else None
    observer = seen(PerChannelMinMaxObserver(ch_axis=axis), x)
    rows = x.movedim(axis, 0).flatten(1)
    assert torch.equal(observer.min_val, rows.amin(1)) and torch.equal(observer.max_val, rows.amax(1))
    averaged = seen(MovingAveragePerChannelMinMaxObserver(0.5, ch_axis=axis), x, 3 * x)
    assert torch.allclose(averaged.max_val, 2 * rows.amax(1))


@pytest.mark.parametrize(
    "make", [PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=1.0)]
)
def test_a_channel_without_a_finite_value_does_not_hide_the_others(make):
    nan = float("nan")
    first = torch.tensor([[nan, nan], [-1.0, 2.0]])
    observer = seen(make(), first)
    assert not observer.has_data and observer.max_val[1] == 2.0
    seen(observer, torch.tensor([[-1.0, 3.0], [-1.0, 2.0]]), first)
    assert observer.has_data and observer.nonfinite_count == 4
    assert observer.min_val.tolist() == [-1.0, -1.0]
    assert observer.max_val.tolist() == [3.0, 2.0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 60))
def test_sum_preserving_rounding_keeps_each_row_s_sum(seed, columns):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(8, columns, generator=generator) * 30
    rounded = sum_preserving_round(steps, -128, 127)
    errors = rounded - steps
    inside = (steps.abs() < 127).all(1)
    assert torch.equal(rounded, rounded.round())
    assert (errors[inside].sum(1).abs() <= 0.5 + 1e-4).all()
    assert (errors[inside].abs() < 1).all()


def test_a_weight_observer_rounds_by_itself():
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3)
    arguments = {"dtype": torch.int8, "qscheme": QScheme.per_channel_symmetric}
    nearest = seen(PerChannelMinMaxObserver(**arguments), weight)
    kept = seen(PerChannelMinMaxObserver(rounding="sum_preserving", **arguments), weight)
    scale = nearest.calculate_qparams()[0].reshape(6, 1, 1, 1)

    def drift(integers):
        assert integers.dtype == torch.int8 and integers.shape == weight.shape
        return (integers * scale - weight).flatten(1).sum(1).abs().sum().item()

    assert drift(kept.quantize(weight)) < 0.5 * drift(nearest.quantize(weight))
