"""The range of least squared error: never worse than the whole range, and no artefact of the bins."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore import (
    HistogramObserver,
    MinMaxObserver,
    QScheme,
)
from tests.observer.helpers import qparams, seen, squared_error

DISTRIBUTIONS = {
    "normal": lambda: torch.randn(5000),
    "relu": lambda: torch.randn(5000).relu(),
    "negative": lambda: -torch.randn(5000).abs(),
    "outlier": lambda: torch.cat([torch.randn(5000), torch.tensor([80.0])]),
    "two values": lambda: torch.tensor([-1.0, 5.0]).repeat(50),
    "constant": lambda: torch.full((100,), 3.0),
    "far from zero": lambda: 1000 + torch.randn(1000),
    "huge": lambda: torch.randn(1000) * 1e30,
    "sparse": lambda: torch.cat([torch.zeros(10000), torch.rand(10)]),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    batches=st.integers(1, 5),
    arguments=st.sampled_from(
        [
            {},
            {"reduce_range": True},
            {"dtype": torch.int8, "qscheme": QScheme.per_tensor_symmetric},
            {"dtype": torch.int8},
        ]
    ),
)
def test_the_histogram_loses_no_more_than_the_whole_range_but_for_the_width_of_its_bins(
    distribution, seed, batches, arguments
):
    torch.manual_seed(seed)
    x = DISTRIBUTIONS[distribution]()
    histogram, whole = HistogramObserver(**arguments), MinMaxObserver(**arguments)
    for batch in x.chunk(batches):
        seen(histogram, batch)
        seen(whole, batch)
    assert histogram.histogram.sum() == x.numel()
    assert squared_error(histogram, x) <= squared_error(whole, x) * 1.08 + 1e-30
    scale, zero_point = histogram.calculate_qparams()
    assert histogram.quant_min <= zero_point <= histogram.quant_max
    assert scale <= whole.calculate_qparams()[0] * 1.0001


@pytest.mark.parametrize("values", [3, 10, 30])
@pytest.mark.parametrize("draw", [torch.rand, lambda n: torch.randint(1, 12, (n,)).float()])
def test_the_histogram_is_not_misled_by_the_middles_of_few_bins(values, draw):
    for seed in range(30):
        torch.manual_seed(seed)
        x = torch.cat([torch.zeros(10_000), draw(values)])
        histogram, whole = seen(HistogramObserver(), x), seen(MinMaxObserver(), x)
        assert squared_error(histogram, x) <= squared_error(whole, x) * 1.01 + 1e-30


def test_an_outlier_is_cut_off():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100_000), torch.tensor([80.0])])
    # One value in 100,000: clipped far below 80, it costs less than the coarse steps would cost all others.
    cut, whole = (seen(make(quant_min=0, quant_max=15), x) for make in (HistogramObserver, MinMaxObserver))
    assert squared_error(cut, x) < 0.3 * squared_error(whole, x)


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.int8, "qscheme": QScheme.per_tensor_symmetric}])
def test_qparams_found_together_are_those_found_one_by_one(arguments):
    torch.manual_seed(0)
    batches = [distribution() * 10.0 ** (number % 5 - 2) for number, distribution in enumerate(DISTRIBUTIONS.values())]
    batches += [torch.zeros(3), torch.tensor([1e-40]), torch.tensor([-2.0]), torch.randn(70_000), torch.randn(5)]
    observers = [seen(HistogramObserver(**arguments), batch) for batch in batches]
    alone = [qparams(copy.deepcopy(observer)) for observer in observers]
    together = HistogramObserver.calculate_all(observers)
    assert [(scale.tolist(), zero_point.tolist()) for scale, zero_point in together] == alone
    assert [qparams(observer) for observer in observers] == alone
