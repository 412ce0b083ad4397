"""Qparams as lowering finds them: integers just as the reference's operators give them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qcore import MinMaxObserver, QConfig, QConfigMapping, QScheme, ops
from qcore.fx.graph_module import get_attribute
from qcore.lowering import QParams, QuantizedWeight
from tests.converting import WEIGHT, convert

SYMMETRIC = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    low=st.floats(-2, 0),
    high=st.floats(0.1, 3),
    activation=st.sampled_from([MinMaxObserver, SYMMETRIC, MinMaxObserver.with_args(quant_min=0, quant_max=127)]),
)
def test_to_absorb_a_clamp_is_to_clamp_and_then_quantize(seed, low, high, activation):
    torch.manual_seed(seed)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    mapping = QConfigMapping().set_global(QConfig(activation, WEIGHT))
    reference = convert(nn.Sequential(conv, nn.Hardtanh(low, high)), x, mapping)
    *_, clamp, _scale, _zero_point, quantize, _dequantize, _ = reference.graph.nodes
    assert clamp.target is torch.clamp  # As a float: its integers depend on the scale.
    scale, zero_point = (get_attribute(reference, node.target) for node in quantize.args[1:3])
    ends = quantize.args[3:5]
    assert ends == ((-128, 127) if activation is SYMMETRIC else (0, 255 if activation is MinMaxObserver else 127))
    qparams = QParams(float(scale), int(zero_point), *ends, quantize.args[5])
    least, most = qparams.clamped(low, high).bounds or ends
    values = torch.cat([3 * torch.randn(200), torch.tensor([low, high, 0.0, float("inf"), -float("inf")])])
    clamped = torch.clamp(values, low, high)
    expected = torch.ops.qcore.quantize_per_tensor(clamped, *(scale, zero_point), *quantize.args[3:])
    found = torch.ops.qcore.quantize_per_tensor(values, *(scale, zero_point), least, most, quantize.args[5])
    assert torch.equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(
    bounds=st.lists(
        st.tuples(st.none() | st.floats(-3, 3, width=32), st.none() | st.floats(-3, 3, width=32)), max_size=4
    ),
    zero_point=st.integers(0, 255),
)
def test_clamps_in_a_row_are_one(bounds, zero_point):
    """Also those of which the upper bound is the smaller one, and those that have nothing in common."""
    qparams = QParams(0.02, zero_point, 0, 255, torch.uint8)
    values = clamped = torch.linspace(-8, 8, 999)
    for low, high in bounds:
        qparams = qparams.clamped(low, high)
        clamped = clamped if low is None and high is None else torch.clamp(clamped, low, high)
    low, high = qparams.bounds or (0, 255)
    arguments = torch.tensor(0.02), torch.tensor(zero_point), 0, 255, torch.uint8
    expected, plain = (torch.ops.qcore.quantize_per_tensor(x, *arguments) for x in (clamped, values))
    assert torch.equal(plain.clamp(low, high), expected)


@settings(deadline=None)
@given(
    value=st.floats(width=32), scale=st.floats(2**-60, 2**60, width=32), zero_point=st.integers(0, 255),
    ends=st.sampled_from([(0, 255), (0, 127), (1, 254)]),
)  # fmt: skip
def test_a_number_s_integer_is_the_operator_s(value, scale, zero_point, ends):
    if math.isnan(value):
        return
    qparams = QParams(scale, zero_point, *ends, torch.uint8)
    arguments = (torch.tensor(scale), torch.tensor(zero_point), *ends, torch.uint8)
    assert qparams.quantize(value) == int(ops.quantize_per_tensor(torch.tensor(value), *arguments))


def test_bounds_are_none_only_where_the_dtype_keeps_them_by_itself():
    whole = QParams(0.5, 10, 0, 255, torch.uint8)
    assert whole.bounds is None and whole.clamped(None, None) == whole
    assert whole.clamped(-100.0, 1000.0).bounds is None  # Beyond the ends.
    assert whole.clamped(0.0, None).bounds == (10, 255) and whole.clamped(0.0, 6.0).bounds == (10, 22)
    assert QParams(0.5, 10, 0, 127, torch.uint8).bounds == (0, 127)


def test_of_bounds_that_cross_the_upper_one_counts_as_torch_has_it():
    qparams = QParams(1.0, 0, -128, 127, torch.int8).clamped(5.0, 3.0)
    assert qparams.bounds == (3, 3)
    assert torch.clamp(torch.tensor([0.0, 4.0, 9.0]), 5.0, 3.0).tolist() == [3.0] * 3
    assert QParams(1.0, 0, -128, 127, torch.int8).clamped(0.0, 2.0).clamped(5.0, 9.0).bounds == (5, 5)


@pytest.mark.parametrize("axis", [None, 0])
def test_a_scale_for_each_channel_is_its_own_tensor(axis):
    scale = torch.tensor(0.5) if axis is None else torch.tensor([0.5, 0.25, 2.0])
    weight = QuantizedWeight(torch.zeros(3, 4, dtype=torch.int8), scale, torch.zeros_like(scale).long(), axis)
    found = weight.scale_per_channel
    assert found.tolist() == ([0.5] * 3 if axis is None else [0.5, 0.25, 2.0]) and found.is_contiguous()
