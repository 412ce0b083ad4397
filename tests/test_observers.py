"""What observers see, and the qparams that they give."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore import (
    DTypeWithConstraints,
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QScheme,
)
from qcore.errors import ConfigError
from qcore.observer.base import in_memory_order
from qcore.observer.histogram import LARGEST_SAMPLE, LEAST_SAMPLE, WHOLE_LIMIT, sampling_stride
from qcore.observer.min_max import sum_preserving_round


def seen(observer, *batches):
    for batch in batches:
        assert observer(batch) is batch
    return observer


def qparams(observer):
    scale, zero_point = observer.calculate_qparams()
    return scale.tolist(), zero_point.tolist()


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


def test_deprecated_dtypes_and_schemes_are_read_as_plain_ones():
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    assert (observer.dtype, observer.qscheme) == (torch.int8, QScheme.per_tensor_symmetric)
    assert MinMaxObserver(dtype=torch.quint8).dtype == torch.uint8


@pytest.mark.parametrize(
    "arguments",
    [
        {"quant_min": 0},
        {"quant_min": 1, "quant_max": 5},
        {"quant_min": 0, "quant_max": 256},
        {"quant_min": 0, "quant_max": 127, "reduce_range": True},
        {"dtype": "uint8"},
        {"qscheme": "per_banana"},
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ConfigError):
        MinMaxObserver(**arguments)


def test_a_moving_average_begins_with_the_first_batch():
    observer = seen(MovingAverageMinMaxObserver(averaging_constant=0.5), torch.tensor([0.0, 2.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (0.0, 2.0)
    seen(observer, torch.tensor([-2.0, 4.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-1.0, 3.0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_those_of_the_axis(axis):
    x = torch.randn(3, 4, 5)
    observer = seen(PerChannelMinMaxObserver(ch_axis=axis), x[:, :2], x) if axis == 2 else None
    observer = seen(PerChannelMinMaxObserver(ch_axis=axis), x)
    rows = x.movedim(axis, 0).flatten(1)
    assert torch.equal(observer.min_val, rows.amin(1)) and torch.equal(observer.max_val, rows.amax(1))
    averaged = seen(MovingAveragePerChannelMinMaxObserver(0.5, ch_axis=axis), x, 3 * x)
    assert torch.allclose(averaged.max_val, 2 * rows.amax(1))


@pytest.mark.parametrize("size", [1e-20, 1e-9, 1.0, 1e20])
@pytest.mark.parametrize("make", [MinMaxObserver, HistogramObserver])
def test_accuracy_does_not_depend_on_the_unit(make, size):
    torch.manual_seed(0)
    x = torch.randn(1000)
    scale, zero_point = seen(make(), x * size).calculate_qparams()
    integers = torch.clamp(torch.round(x * size / scale) + zero_point, 0, 255)
    error = ((integers - zero_point) * scale - x * size) / size
    assert error.pow(2).mean().sqrt() < 0.01


def test_a_range_of_nothing_but_zero_keeps_a_usable_scale():
    assert qparams(seen(MinMaxObserver(), torch.zeros(3))) == (1.0, 0)
    weights = torch.tensor([[0.0, 0.0], [-2.0, 1.0]])
    scale, _ = seen(PerChannelMinMaxObserver(qscheme=QScheme.per_channel_symmetric), weights).calculate_qparams()
    assert scale[0] == scale[1] > 0


@pytest.mark.parametrize(
    "make", [MinMaxObserver, HistogramObserver, PerChannelMinMaxObserver, MovingAverageMinMaxObserver]
)
def test_nan_and_infinity_are_counted_and_left_out(make):
    observer = seen(make(), torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), -1.0, float("-inf")]]))
    assert observer.nonfinite_count == 3
    assert observer.min_val.min() == -1.0 and observer.max_val.max() == 2.0
    assert torch.isfinite(observer.calculate_qparams()[0]).all()


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


@pytest.mark.parametrize("make", [MinMaxObserver, HistogramObserver, PerChannelMinMaxObserver])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("integers", [(0, 255), (0, 1)])
def test_a_range_as_wide_as_float32_has_a_finite_scale(make, symmetric, integers):
    scheme = f"per_{'channel' if make is PerChannelMinMaxObserver else 'tensor'}"
    scheme += "_symmetric" if symmetric else "_affine"
    observer = make(qscheme=scheme, quant_min=integers[0], quant_max=integers[1])
    x = torch.tensor([[-3e38, 3e38, 1e38]])
    scale, zero_point = seen(observer, x).calculate_qparams()
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert ((zero_point >= 0) & (zero_point <= 255)).all()
    if integers == (0, 255):
        back = (observer.quantize(x).double() - zero_point) * scale.double()
        assert (back - x.double()).abs().max() <= 1.01 * scale.double()


@pytest.mark.parametrize("make", [MinMaxObserver, HistogramObserver, MovingAverageMinMaxObserver])
def test_no_data_and_empty_tensors_are_no_data(make):
    assert not seen(make(), torch.empty(0)).has_data
    assert not seen(make(), torch.tensor([float("nan")])).has_data
    assert seen(make(), torch.tensor(0.0)).has_data


@pytest.mark.parametrize("make", [MinMaxObserver, HistogramObserver, PerChannelMinMaxObserver])
def test_an_observer_survives_copying_pickling_and_a_state_dict(make):
    observer = seen(make(), torch.randn(4, 6))
    for copied in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert qparams(copied) == qparams(observer)
    fresh = make()
    fresh.load_state_dict(observer.state_dict())
    assert qparams(fresh) == qparams(observer)
    observer.reset_min_max_vals()
    assert not observer.has_data


def test_a_spec_compares_hashes_pickles_and_binds_more():
    spec = MinMaxObserver.with_args(dtype=torch.int8)
    assert spec == MinMaxObserver.with_args(dtype=torch.int8) and hash(spec) == hash(spec.with_args())
    assert spec != spec.with_args(reduce_range=True)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec(quant_min=-4, quant_max=4).quant_max == 4
    assert repr(spec) == "MinMaxObserver(dtype=torch.int8)"


def test_observers_without_data():
    assert qparams(FixedQParamsObserver(1 / 256, 3)) == (1 / 256, 3)
    placeholder = PlaceholderObserver(dtype=torch.float16, is_dynamic=True)
    assert placeholder.has_data and placeholder(X) is X
    with pytest.raises(NotImplementedError, match="gives no qparams"):
        placeholder.calculate_qparams()


def squared_error(observer, x):
    scale, zero_point = observer.calculate_qparams()
    integers = torch.clamp(torch.round(x / scale) + zero_point, observer.quant_min, observer.quant_max)
    return ((integers - zero_point) * scale - x).double().pow(2).mean().item()


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


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.rand(2, 3, 4).transpose(1, 2),
        torch.rand(2, 1, 3, 1, 4).permute(4, 3, 0, 1, 2),
        torch.rand(3, 4, 5)[1],
        torch.tensor(1.0),
    ],
)
def test_dense_tensors_are_read_where_they_lie(x):
    row = in_memory_order(x)
    assert row.dim() == 1 and row.data_ptr() == x.data_ptr()
    assert torch.equal(row.sort().values, x.flatten().sort().values)


@pytest.mark.parametrize("x", [torch.rand(4, 6)[:, ::2], torch.rand(3, 1).expand(3, 4)])
def test_other_tensors_are_read_as_copies(x):
    assert torch.equal(in_memory_order(x).sort().values, x.flatten().sort().values)


@pytest.mark.parametrize(
    "make", [MinMaxObserver, HistogramObserver, PerChannelMinMaxObserver, MovingAverageMinMaxObserver]
)
def test_calibrating_in_inference_mode_leaves_observers_usable(make):
    observer = make()
    with torch.inference_mode():
        seen(observer, torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, 4.0]]))
    seen(observer, torch.tensor([[-3.0, 0.0]]), torch.tensor([[float("nan"), 9.0]]))
    assert observer.has_data and observer.nonfinite_count == 1


@pytest.mark.parametrize("make", [MinMaxObserver, HistogramObserver])
def test_what_is_loaded_or_reset_is_what_counts_from_then_on(make):
    wide, narrow = seen(make(), torch.tensor([-8.0, 8.0])), seen(make(), torch.tensor([-1.0, 1.0]))
    wide.load_state_dict(narrow.state_dict())
    assert qparams(wide) == qparams(narrow)
    more = torch.tensor([-2.0, 3.0])
    assert qparams(seen(wide, more)) == qparams(seen(make(), torch.tensor([-1.0, 1.0]), more))
    wide.reset_min_max_vals()
    assert qparams(seen(wide, more)) == qparams(seen(make(), more))


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


@pytest.mark.parametrize("value", [0, -1, 0.0, -1e-3, math.nan, math.inf, 1e-50, 1e39, "0.1", True, torch.tensor(0.1)])
def test_what_can_be_no_scale_is_refused(value):
    for make in (
        lambda: MinMaxObserver(eps=value),
        lambda: HistogramObserver(eps=value),
        lambda: FixedQParamsObserver(scale=value, zero_point=0),
        lambda: DTypeWithConstraints(scale_min_lower_bound=value),
        lambda: DTypeWithConstraints(scale_max_upper_bound=value),
        lambda: DTypeWithConstraints(scale_exact_match=value),
    ):
        with pytest.raises(ConfigError, match=r"(eps|scale\w*) must be a positive number that float32 holds, found"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinMaxObserver(quant_min=5, quant_max=5), r"the range 5\.\.5 must hold 0"),
        (lambda: MinMaxObserver(quant_min=0, quant_max=0), r"the range 0\.\.0 must hold 0"),
        (lambda: MinMaxObserver(quant_min=0, quant_max=256), r"fit uint8 \(0\.\.255\)"),
        (lambda: MinMaxObserver(dtype=torch.int8, quant_min=-129, quant_max=1), r"fit int8 \(-128\.\.127\)"),
        (lambda: MinMaxObserver(quant_min=0.5, quant_max=9), "quant_min must be an integer, found 0.5"),
        (lambda: MinMaxObserver(quant_min=0, quant_max="9"), "quant_max must be an integer, found '9'"),
        (lambda: FixedQParamsObserver(0.1, 256), r"zero_point 256 lies outside the range 0\.\.255"),
        (lambda: FixedQParamsObserver(0.1, -1), r"zero_point -1 lies outside the range 0\.\.255"),
        (lambda: FixedQParamsObserver(0.1, 9, dtype=torch.int8, quant_min=-8, quant_max=7), "outside the range -8..7"),
        (lambda: FixedQParamsObserver(0.1, 1.5), "zero_point must be an integer, found 1.5"),
        (lambda: MovingAverageMinMaxObserver(averaging_constant=0), "averaging_constant must lie within"),
        (lambda: MovingAverageMinMaxObserver(averaging_constant=math.nan), "averaging_constant must lie within"),
        (lambda: MovingAveragePerChannelMinMaxObserver(averaging_constant=2), "averaging_constant must lie within"),
        (lambda: HistogramObserver(bins=1), "bins must be 2 at least, found 1"),
        (lambda: HistogramObserver(bins=2.5), "bins must be an integer"),
        (lambda: PerChannelMinMaxObserver(ch_axis="0"), "ch_axis must be an integer"),
        (lambda: PerChannelMinMaxObserver(rounding="up"), "rounding must be .*, found 'up'"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused_when_an_observer_is_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_integers_and_numbers_of_numpy_are_taken():
    np = pytest.importorskip("numpy")
    observer = MinMaxObserver(quant_min=np.int64(0), quant_max=np.int32(7), eps=np.float32(0.5))
    assert (observer.quant_min, observer.quant_max, observer.eps) == (0, 7, 0.5)
    assert type(observer.quant_max) is int
    assert FixedQParamsObserver(np.float64(0.5), np.int8(3)).zero_point == 3
