"""quantize and dequantize on plain integers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcore import ops
from qcore.errors import DtypeError


def quantize(values, scale, zero_point, low=0, high=255, dtype=torch.uint8):
    arguments = (torch.tensor(scale), torch.tensor(zero_point), low, high, dtype)
    return ops.quantize_per_tensor(torch.tensor(values), *arguments)


def test_ties_go_to_even_and_the_range_is_kept():
    found = quantize([-9.0, 0.25, 0.75, 1.25, 1e6, -0.0], 0.5, 10, high=100)
    assert found.dtype == torch.uint8
    assert found.tolist() == [0, 10, 12, 12, 100, 10]


def test_what_is_no_number_becomes_zero_and_what_is_infinite_an_end():
    nan, inf = float("nan"), float("inf")
    assert quantize([nan, inf, -inf], 0.5, 10).tolist() == [10, 255, 0]
    integers = ops.quantize_per_channel(
        torch.tensor([[nan], [nan]]), torch.ones(2), torch.tensor([3, -4]), 0, -128, 127, torch.int8
    )
    assert integers.flatten().tolist() == [3, -4]


def test_the_input_is_left_alone():
    x = torch.tensor([1.0, float("nan"), 1e9])
    before = x.clone()
    ops.quantize_per_tensor(x, torch.tensor(1.0), torch.tensor(0), 0, 255, torch.uint8)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("zero_point", [0, 7, -7])
def test_the_ends_of_int32_are_kept(zero_point):
    low, high = -(2**31), 2**31 - 1
    found = quantize([1e20, -1e20, 5.0], 1.0, zero_point, low, high, torch.int32)
    assert found.tolist() == [high, low, 5 + zero_point]


def test_dequantize_is_the_inverse_on_integers():
    integers = torch.arange(256, dtype=torch.uint8)
    scale, zero_point = torch.tensor(0.1), torch.tensor(77)
    real = ops.dequantize_per_tensor(integers, scale, zero_point)
    assert torch.equal(real, (integers.int() - 77).float() * 0.1)
    assert torch.equal(ops.quantize_per_tensor(real, scale, zero_point, 0, 255, torch.uint8), integers)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_channel_has_its_own_scale(axis):
    x = torch.randn(3, 3, 3)
    scales, zero_points = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, -1])
    found = ops.quantize_per_channel(x, scales, zero_points, axis, -128, 127, torch.int8)
    back = ops.dequantize_per_channel(found, scales, zero_points, axis)
    for channel in range(3):
        part = x.select(axis, channel)
        expected = ops.quantize_per_tensor(part, scales[channel], zero_points[channel], -128, 127, torch.int8)
        assert torch.equal(found.select(axis, channel), expected)
    assert ((back - x).abs() <= 0.15 + 1e-6).all()


def test_they_run_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3)
        integers = ops.quantize_per_tensor(x, torch.tensor(1.0), torch.tensor(0), 0, 255, torch.uint8)
        assert (integers.dtype, integers.shape) == (torch.uint8, (2, 3))
        assert ops.dequantize_per_tensor(integers, torch.tensor(1.0), torch.tensor(0)).dtype == torch.float32


def test_torch_finds_them_well_defined():
    arguments = (torch.randn(4), torch.tensor(0.1), torch.tensor(3), 0, 255, torch.uint8)
    torch.library.opcheck(ops.quantize_per_tensor, arguments, test_utils=("test_schema", "test_faketensor"))


EXACT = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_the_operators_refuse_what_they_would_have_to_round(dtype: torch.dtype) -> None:
    x = torch.ones(3).to(dtype)
    with pytest.raises(DtypeError, match=rf"float32.*found {dtype}; cast it: x\.float\(\)"):
        ops.quantize_per_tensor(x, torch.tensor(0.1), torch.tensor(0), 0, 255, torch.uint8)
    with pytest.raises(DtypeError):
        ops.quantize_per_channel(x, torch.ones(3), torch.zeros(3, dtype=torch.int64), 0, 0, 255, torch.uint8)
    with pytest.raises(DtypeError):
        ops.dynamic_quantize_dequantize(x, 0, 255)


@EXACT
def test_the_operators_compute_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(500) * 3).to(dtype)
    arguments = (torch.tensor(0.0317), torch.tensor(128), 0, 255, torch.uint8)
    assert torch.equal(ops.quantize_per_tensor(x, *arguments), ops.quantize_per_tensor(x.float(), *arguments))
    assert torch.equal(ops.dynamic_quantize_dequantize(x, 0, 255), ops.dynamic_quantize_dequantize(x.float(), 0, 255))


def test_qparams_at_run_time():
    scale, zero_point = ops.dynamic_qparams(torch.tensor([-1.0, 0.5, 2.0]), 0, 255)
    assert float(scale) == pytest.approx(3 / 255) and int(zero_point) == 85
    scale, zero_point = ops.dynamic_qparams(torch.tensor([1.0, 2.0]), 0, 255)  # Zero is always included.
    assert float(scale) == pytest.approx(2 / 255) and int(zero_point) == 0
    for empty in (torch.empty(0), torch.zeros(3)):
        assert torch.equal(ops.dynamic_quantize_dequantize(empty, 0, 255), empty)
