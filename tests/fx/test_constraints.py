"""What a kernel demands of an observer, and the qparams that result from both."""

import pytest
import torch
from torch import nn

import qcore
from qcore import (
    DTypeConfig,
    DTypeWithConstraints,
    FixedQParamsObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    QScheme,
)
from qcore.fx.constraints import bounds_within, constrained, gives_float, reads_float, violation
from qcore.qconfig import observer_traits
from tests.fx.planning import LINEARS, OPEN, U8, WEIGHT, conv, linear_config, prepare


def test_a_range_that_was_left_open_takes_the_kernel_s_bounds():
    narrow = DTypeWithConstraints(torch.uint8, 0, 127, scale_min_lower_bound=2**-12)
    weight = DTypeWithConstraints(torch.int8, -64, 63)
    prepared = prepare(LINEARS, shape=(2, 4), config=linear_config(DTypeConfig(narrow, torch.uint8, weight)))
    plan = qcore.explain(prepared)
    # The first output is read by a kernel that takes 0..127; the last one by nobody.
    assert [(t.quant_min, t.quant_max, t.eps) for t in plan.qparams] == [(0, 127, 2**-12)] * 2 + [(0, 255, None)]
    assert (prepared.activation_post_process_1.quant_max, prepared.activation_post_process_1.eps) == (127, 2**-12)
    assert [(w.spec.quant_min, w.spec.quant_max) for w in plan.weights] == [(-64, 63)] * 2


@pytest.mark.parametrize(
    ("dtype_config", "qconfig", "reason"),
    [
        (U8, QConfig(MinMaxObserver.with_args(dtype=torch.int8), WEIGHT), "input dtype int8, it takes uint8"),
        (
            DTypeConfig(weight_dtype=DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_tensor_symmetric,))),
            QConfig(MinMaxObserver, PerChannelMinMaxObserver.with_args(dtype=torch.int8)),
            "weight per_channel_affine, it takes per_tensor_symmetric",
        ),
        (
            DTypeConfig(torch.uint8, torch.uint8, DTypeWithConstraints(torch.int8, ch_axis=0)),
            QConfig(MinMaxObserver, PerChannelMinMaxObserver.with_args(dtype=torch.int8, ch_axis=1)),
            "weight ch_axis 1, it takes 0",
        ),
        (
            DTypeConfig(DTypeWithConstraints(torch.uint8, scale_min_lower_bound=0.1), torch.uint8, torch.int8),
            QConfig(MinMaxObserver.with_args(eps=0.01), WEIGHT),
            "input eps 0.01 < 0.1 (scale_min_lower_bound)",
        ),
        (
            DTypeConfig(torch.uint8, DTypeWithConstraints(torch.uint8, scale_exact_match=0.5), torch.int8),
            QConfig(qcore.FixedQParamsObserver.with_args(scale=0.25, zero_point=0), WEIGHT),
            "output scale 0.25, it takes exactly 0.5",
        ),
        (DTypeConfig(bias_dtype=torch.int32), OPEN, "bias dtype float32, it takes int32"),
        (U8, QConfig(MinMaxObserver.with_args(is_dynamic=True), WEIGHT), "it offers no dynamic quantization here"),
        (
            DTypeConfig(), QConfig(qcore.PlaceholderObserver.with_args(dtype=torch.float16), WEIGHT),
            "a placeholder observer of float16 gives no static qparams",
        ),
        (U8, QConfig(PerChannelMinMaxObserver, WEIGHT), "activations per channel aren't offered"),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_take_is_refused_by_name(dtype_config, qconfig, reason):
    mapping = QConfigMapping().set_global(qconfig)
    plan = qcore.explain(prepare(LINEARS, mapping, (2, 4), linear_config(dtype_config), on_unsupported="ignore"))
    assert {d.reason for d in plan.decisions} == {f"test doesn't accept its qconfig: {reason}"}


def test_a_scale_that_is_too_large_for_a_kernel_is_refused_when_the_data_is_in():
    limited = DTypeConfig(DTypeWithConstraints(torch.uint8, scale_max_upper_bound=0.1), torch.uint8, torch.int8)
    prepared = prepare(LINEARS, shape=(2, 4), config=linear_config(limited))
    prepared(torch.rand(8, 4))
    qcore.convert_fx(prepared)
    prepared(1000 * torch.rand(8, 4))
    with pytest.raises(qcore.errors.ConfigError, match=r"activation_post_process_0 found the scale .*scale_max_upper"):
        qcore.convert_fx(prepared)


def test_fixed_qparams_come_from_the_kernel():
    made = nn.Sequential(conv(), nn.Sigmoid()).eval()
    prepared = prepare(made)
    prepared(torch.randn(2, 4, 6, 6))
    assert [v.item() for v in prepared.activation_post_process_2.calculate_qparams()] == [1 / 256, 0]


def constraints(**demands):
    return DTypeWithConstraints(torch.uint8, **demands)


@pytest.mark.parametrize(
    ("observer", "demands", "found"),
    [
        (MinMaxObserver, {}, None),
        (MinMaxObserver.with_args(dtype=torch.int8), {}, "input dtype int8, it takes uint8"),
        (MinMaxObserver, {"qschemes": (QScheme.per_tensor_symmetric,)}, "per_tensor_affine, it takes per_tensor_s"),
        (PerChannelMinMaxObserver.with_args(ch_axis=1), {"ch_axis": 0}, "input ch_axis 1, it takes 0"),
        (MinMaxObserver, {"ch_axis": 0}, None),  # It has no channels.
        (MinMaxObserver, {"quant_max_upper_bound": 127}, None),  # Nobody chose 255.
        (MinMaxObserver.with_args(quant_min=0, quant_max=255), {"quant_max_upper_bound": 127}, "quant_max 255 > 127"),
        (MinMaxObserver.with_args(quant_min=0, quant_max=255), {"quant_min_lower_bound": 1}, "quant_min 0 < 1"),
        (MinMaxObserver.with_args(quant_min=0, quant_max=127), {"quant_max_upper_bound": 127}, None),
        (MinMaxObserver.with_args(eps=2**-13), {"scale_min_lower_bound": 2**-12}, r"eps 0.0001220703125 < 0.000244"),
        (MinMaxObserver, {"scale_min_lower_bound": 2**-12}, None),
        (FixedQParamsObserver.with_args(scale=0.5, zero_point=0), {"scale_exact_match": 0.25}, "scale 0.5, it takes"),
        (FixedQParamsObserver.with_args(scale=0.5, zero_point=1), {"zero_point_exact_match": 0}, "point 1, it takes"),
        (FixedQParamsObserver.with_args(scale=0.5, zero_point=1), {"zero_point_exact_match": 1}, None),
    ],
)  # fmt: skip
def test_a_violation_is_what_the_user_stated_and_the_kernel_does_not_take(observer, demands, found):
    told = violation("input", observer_traits(observer), constraints(**demands), fixes_count=True)
    assert told is None if found is None else told.startswith("input ") and found in told


def test_exact_demands_are_compared_only_where_they_count():
    traits = observer_traits(FixedQParamsObserver.with_args(scale=0.5, zero_point=1))
    assert violation("input", traits, constraints(scale_exact_match=0.25), fixes_count=False) is None


def test_qparams_lie_within_what_both_take():
    traits = observer_traits(MinMaxObserver.with_args(quant_min=0, quant_max=200))
    narrow = constraints(quant_min_lower_bound=1, quant_max_upper_bound=127)
    assert bounds_within(traits, narrow) == (1, 127)
    assert bounds_within(traits, constraints()) == (0, 200)
    made = constrained(MinMaxObserver, traits, constraints(scale_min_lower_bound=2**-12, scale_max_upper_bound=4))
    assert (made.quant_min, made.quant_max, made.eps, made.scale_max, made.fixed) == (0, 200, 2**-12, 4.0, None)


def test_a_kernel_s_fixed_qparams_need_both_and_go_before_the_observer_s():
    traits = observer_traits(FixedQParamsObserver.with_args(scale=0.5, zero_point=1))
    assert constrained(MinMaxObserver, traits, constraints(scale_exact_match=0.25)).fixed == (0.5, 1)
    both = constraints(scale_exact_match=0.25, zero_point_exact_match=0)
    assert constrained(MinMaxObserver, traits, both).fixed == (0.25, 0)


@pytest.mark.parametrize(
    ("made", "reads", "gives"),
    [
        (DTypeConfig(torch.uint8, torch.uint8), False, False), (DTypeConfig(torch.uint8, torch.float32), False, True),
        (DTypeConfig(torch.float32, torch.float32, torch.int8), True, True),
        (DTypeConfig(torch.uint8, torch.float32, is_dynamic=True), True, True), (DTypeConfig(), False, False),
    ],
)  # fmt: skip
def test_which_kernels_read_and_give_float(made, reads, gives):
    assert (reads_float(made), gives_float(made)) == (reads, gives)
