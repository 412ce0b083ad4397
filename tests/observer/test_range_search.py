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
from qcore.observer.range_search import Histogram, ranges_of_least_error
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


def histogram(values, counts=None):
    values = torch.as_tensor(values, dtype=torch.float64)
    counts = torch.ones_like(values) if counts is None else torch.as_tensor(counts, dtype=torch.float64)
    return Histogram(counts, values, min(values.min().item(), 0.0), max(values.max().item(), 0.0))


def error(found, range_, integers, middle):
    """The squared error of a range, computed in the plainest way."""
    low, high = range_
    least, most = integers
    if middle is None:
        scale = (high - low) / (most - least)
        zero_point = min(max(round(least - low / scale), least), most)
    else:
        scale, zero_point = max(-low, high) / ((most - least) / 2), middle
    steps = (found.values / scale).round().add(zero_point).clamp(least, most).sub(zero_point)
    return float(((steps * scale - found.values).square() * found.counts).sum())


SCHEMES = [((0, 255), None), ((0, 15), None), ((-128, 127), 0), ((-8, 7), 0), ((0, 15), 8)]


@pytest.mark.parametrize(("integers", "middle"), SCHEMES)
@pytest.mark.parametrize("shape", ["normal", "one-sided", "outlier"])
def test_the_range_is_nearly_the_best_of_a_fine_grid(integers, middle, shape):
    x = torch.linspace(-4, 4, 300, dtype=torch.float64)
    made = {
        "normal": histogram(x, torch.exp(-x * x / 2)),
        "one-sided": histogram(x[x > 0], torch.exp(-x[x > 0])),
        "outlier": histogram(torch.cat([x, torch.tensor([60.0])]), torch.cat([100 * torch.exp(-x * x), torch.ones(1)])),
    }[shape]
    ((low, high),) = ranges_of_least_error([made], integers, middle)
    assert made.low <= low <= 0 <= high <= made.high
    cuts = torch.linspace(0.01, 1, 60).tolist()
    ends = [(a * made.low, b * made.high) for a in cuts for b in (cuts if middle is None and made.low else [a])]
    best = min(error(made, range_, integers, middle) for range_ in ends)
    # A cut that saves less than a fiftieth isn't taken.
    assert error(made, (low, high), integers, middle) <= best / (1 - 0.025)
    assert error(made, (low, high), integers, middle) <= error(made, (made.low, made.high), integers, middle)


def test_a_range_does_not_depend_on_what_is_searched_beside_it():
    generator = torch.Generator().manual_seed(0)
    made = [
        histogram(torch.randn(n, generator=generator).double() * 10.0**e, torch.rand(n, generator=generator))
        for n, e in ((3, 0), (64, -20), (65, 20), (700, 0), (2048, 3), (2048, -3))
    ]
    for integers, middle in SCHEMES:
        alone = [ranges_of_least_error([one], integers, middle)[0] for one in made]
        assert ranges_of_least_error(made, integers, middle) == alone
        assert ranges_of_least_error(made[::-1], integers, middle) == alone[::-1]


def test_another_unit_is_another_unit_and_nothing_else():
    x = torch.randn(500, generator=torch.Generator().manual_seed(1)).double()
    ((low, high),) = ranges_of_least_error([histogram(x)], (0, 15), None)
    for power in (-100, -3, 7, 90):
        assert ranges_of_least_error([histogram(x * 2.0**power)], (0, 15), None) == [
            (low * 2.0**power, high * 2.0**power)
        ]


@pytest.mark.parametrize("values", [[0.0], [-1.0, 5.0], [3.0], [0.0, 1e-3]])
def test_one_or_two_values_keep_their_range(values):
    made = histogram(values, [1.0] * len(values))
    assert ranges_of_least_error([made], (0, 255), None) == [(made.low, made.high)]
    assert ranges_of_least_error([], (0, 255), None) == []
