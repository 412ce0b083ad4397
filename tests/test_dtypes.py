"""Integer dtypes and schemes as plain data; deprecated ones are read by their names."""

import math

import pytest
import torch

from qcore.dtypes import (
    QScheme,
    canonical_dtype,
    canonical_qscheme,
    checked_integer,
    checked_scale,
    dtype_name,
    dtype_range,
    is_integer,
    same_dtype,
)
from qcore.errors import ConfigError


@pytest.mark.parametrize(
    ("dtype", "plain"),
    [
        (torch.quint8, torch.uint8), (torch.qint8, torch.int8), (torch.qint32, torch.int32), (torch.int8, torch.int8),
        (torch.int16, torch.int16), (torch.float32, torch.float32), (torch.float16, torch.float16),
    ],
)  # fmt: skip
def test_a_quantized_dtype_is_that_of_its_integers_and_any_other_itself(dtype, plain):
    assert canonical_dtype(dtype) is plain


@pytest.mark.parametrize("dtype", [torch.quint4x2, torch.quint2x4, "uint8", int, None])
def test_what_is_no_dtype_or_none_that_holds_whole_integers_is_refused(dtype):
    with pytest.raises(ConfigError, match=r"torch\.uint8"):
        canonical_dtype(dtype)


def test_a_scheme_is_read_by_torch_s_name():
    for scheme in QScheme:
        assert canonical_qscheme(getattr(torch, scheme.value)) is canonical_qscheme(scheme) is scheme
        assert (scheme.per_channel, scheme.symmetric) == ("channel" in scheme.value, "affine" not in scheme.value)
    for other in (torch.per_channel_affine_float_qparams, "affine", None):
        with pytest.raises(ConfigError, match="expected a qscheme"):
            canonical_qscheme(other)


def test_ranges_and_names():
    assert [dtype_range(d) for d in (torch.uint8, torch.int8, torch.int32)] == [
        (0, 255), (-128, 127), (-(2**31), 2**31 - 1),
    ]  # fmt: skip
    assert [dtype_name(d) for d in (torch.uint8, torch.bfloat16, None)] == ["uint8", "bfloat16", "any"]
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float32)
    assert [is_integer(d) for d in integers] == [True, True, True, True, False, False, False]


LIMITS = torch.finfo(torch.float32)


@pytest.mark.parametrize("value", [LIMITS.tiny, LIMITS.max, 1, 0.1, 2**-20])
def test_a_scale_is_any_normal_number_of_float32(value):
    assert checked_scale(value, "scale") == value and type(checked_scale(value, "scale")) is float


@pytest.mark.parametrize(
    "value", [LIMITS.tiny / 2, math.nextafter(LIMITS.max, math.inf), 0, -1, math.nan, math.inf, True, "1", None, 1j]
)
def test_and_nothing_else(value):
    with pytest.raises(ConfigError, match="^eps must be a positive number that float32 holds, found"):
        checked_scale(value, "eps")


@pytest.mark.parametrize("value", [1.0, True, "1", None, torch.tensor(1)])
def test_an_integer_is_one_of_python_or_numpy(value):
    np = pytest.importorskip("numpy")
    assert type(checked_integer(np.int8(-3), "zero_point")) is int and checked_integer(7, "") == 7
    with pytest.raises(ConfigError, match="^zero_point must be an integer, found"):
        checked_integer(value, "zero_point")


def test_a_move_changes_the_device_and_no_dtype():
    moved = same_dtype(lambda tensor: tensor.to("meta", torch.float16))
    for tensor in (torch.ones(2), torch.ones(2, dtype=torch.int8), torch.ones(2, dtype=torch.float64)):
        assert (moved(tensor).dtype, moved(tensor).device.type) == (tensor.dtype, "meta")
    cast, x = same_dtype(lambda tensor: tensor.half()), torch.tensor([1.0, 1e-8, 1e9])
    assert torch.equal(cast(x), x)  # Not there and back, which would lose digits.
