"""What all observers have in common: arguments, qparams of a range, data that is no data, copies and state."""

import copy
import math
import pickle

import pytest
import torch

from qcore import (
    DTypeWithConstraints,
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    QScheme,
)
from qcore.errors import ConfigError
from qcore.observer.base import in_memory_order
from tests.observer.helpers import qparams, seen


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
