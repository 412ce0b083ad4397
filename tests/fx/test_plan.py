"""What is decided for each operator and each value."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import (
    BackendPatternConfig,
    DTypeConfig,
    DTypeWithConstraints,
    MinMaxObserver,
    QConfig,
    QConfigMapping,
)
from qcore.testing import ask_by_name
from tests.fx.planning import LINEARS, OPEN, U8, WEIGHT, config, conv, model, observed, prepare


def test_a_clamp_after_an_operator_is_observed_after_and_not_before():
    for clamp, name in ((nn.ReLU(), "relu"), (nn.ReLU6(), "relu6"), (nn.Hardtanh(-1, 2), "hardtanh")):
        prepared = prepare(nn.Sequential(conv(), clamp, nn.Hardtanh(-0.5, 0.5)).eval())
        assert observed(prepared) == [("input_1", 0), ("_2", 1)]
        (decision,) = qcore.explain(prepared).decisions
        assert decision.operators == ("conv2d", name, "hardtanh")


@pytest.mark.parametrize(
    ("clamp", "name"),
    [
        (F.relu, "relu"), (torch.relu, "relu"), (lambda x: x.relu(), "relu"), (lambda x: x.relu_(), "relu"),
        (lambda x: x.clamp(min=0), "relu"), (F.relu6, "relu6"), (lambda x: x.clamp(0, 6), "relu6"),
        (lambda x: F.hardtanh(x, 0, 6), "hardtanh"), (lambda x: F.hardtanh_(x, -2, 2), "hardtanh"),
        (lambda x: x.clamp(-1, 1), "clamp"), (lambda x: x.clamp(max=6), "clamp"),
    ],
)  # fmt: skip
def test_a_clamp_reads_as_the_activation_that_it_is(clamp, name):
    plan = qcore.explain(prepare(model(lambda m, x: clamp(m.a(x)), a=conv())))
    assert [d.operators for d in plan.decisions] == [("conv2d", name)]


def test_a_clamp_of_something_read_twice_stays():
    prepared = prepare(model(lambda m, x: F.relu(m.a(x)) + m.a(x), a=conv()))
    assert [d.operators for d in qcore.explain(prepared).decisions][-1] == ("add",)
    twice = prepare(model(lambda m, x: (lambda y: F.relu6(y) + y)(m.a(x)), a=conv()))
    assert [d.operators for d in qcore.explain(twice).decisions] == [("conv2d",), ("relu6",), ("add",)]


def test_a_clamp_that_a_rule_says_stays_float_is_not_absorbed():
    mapping = QConfigMapping().set_global(OPEN).set_object_type(nn.ReLU6, None)
    plan = qcore.explain(prepare(nn.Sequential(conv(), nn.ReLU6()).eval(), mapping))
    assert [(d.operators, d.quantized) for d in plan.decisions] == [(("conv2d",), True), (("relu6",), False)]
    assert plan.floating[0].reason == "rule object_type ReLU6 says float"


def test_a_clamp_that_no_rule_names_goes_with_its_operator():
    mapping = QConfigMapping().set_object_type(nn.Conv2d, OPEN)
    (decision,) = qcore.explain(prepare(nn.Sequential(conv(), nn.ReLU()).eval(), mapping)).decisions
    assert decision.operators == ("conv2d", "relu") and decision.quantized


def test_a_residual_block():
    made = model(lambda m, x: (y := m.s(x), F.relu(m.b(F.relu(m.a(y))) + y))[1], s=conv(), a=conv(), b=conv())
    assert observed(prepare(made)) == [("x", 0), ("s", 1), ("relu", 2), ("b", 3), ("relu_1", 4)]


def test_a_cat_makes_its_inputs_share_one_observer():
    made = model(lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1), a=conv(), b=conv(), c=conv())
    prepared = prepare(made)
    assert observed(prepared) == [("x", 0), ("a", 1), ("b", 1), ("c", 1)]
    assert qcore.explain(prepared).shared == {"cat": 1}


def test_what_only_moves_elements_stays_float_if_its_input_is():
    plan = qcore.explain(prepare(model(lambda m, x: m.a(F.max_pool2d(x, 2)), a=conv())))
    first = plan.decisions[0]
    assert (first.quantized, first.reason) == (False, "its input is float, and it only hands on what it gets")


def without_saving(decisions):
    reason = "it has no weights, and integers wouldn't save a conversion here"
    return [d.node for d in decisions if not d.quantized and d.reason == reason]


def test_what_has_no_weights_is_quantized_where_that_saves_a_conversion():
    residual = model(lambda m, x: m.norm(x + m.a(x)), a=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    # As many conversions either way; the norm reads it as float, and float rounds once less.
    assert without_saving(qcore.explain(prepare(residual, shape=(2, 4))).decisions) == ["add"]
    apart = model(lambda m, x: m.norm(x.sin() + m.a(x)), a=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    assert without_saving(qcore.explain(prepare(apart, shape=(2, 4))).decisions) == ["add"]
    # Between a float and integers, float rounds once less.
    scaled = model(lambda m, x: m.a(x * 2), a=nn.Linear(4, 4))
    assert without_saving(qcore.explain(prepare(scaled, shape=(2, 4))).decisions) == ["mul"]
    # Between integers it is quantized, and where a rule names it.
    between = model(lambda m, x: m.b(m.a(x) * m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert without_saving(qcore.explain(prepare(between, shape=(2, 4))).decisions) == []
    named = ask_by_name(QConfigMapping().set_global(OPEN))
    assert without_saving(qcore.explain(prepare(scaled, named, shape=(2, 4))).decisions) == []


@pytest.mark.parametrize(
    "average", [lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: x.mean([2, 3])]
)
def test_averages_have_qparams_of_their_own(average):
    prepared = prepare(model(lambda m, x: average(m.a(x)), a=conv()))
    assert len(observed(prepared)) == 3


def test_an_operator_without_a_pattern_is_a_float_island():
    prepared = prepare(model(lambda m, x: m.b(torch.sin(m.a(x))), a=conv(), b=conv()))
    # What the sine reads as float isn't rounded before.
    assert observed(prepared) == [("x", 0), ("sin", 1), ("b", 2)]
    assert [d.reason for d in qcore.explain(prepared).floating] == ["reference has no pattern for it"]


def test_a_module_called_twice_has_two_outputs():
    prepared = prepare(model(lambda m, x: m.a(m.a(x)), a=conv()))
    assert observed(prepared) == [("x", 0), ("a", 1), ("a_1", 2)]


def test_a_float_value_read_by_several_is_observed_once():
    prepared = prepare(model(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()))
    assert observed(prepared)[0] == ("x", 0)
    assert len(observed(prepared)) == 4


def test_readers_that_stay_float_read_the_float_value():
    made = model(lambda m, x: (m.a(x), torch.sin(x)), a=conv())
    prepared = prepare(made)
    (sin,) = (n for n in prepared.graph.nodes if n.name == "sin")
    assert sin.args[0].op == "placeholder"


def test_integers_and_other_dtypes_stay_what_they_are():
    plan = qcore.explain(
        qcore.prepare_fx(
            nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval(),
            QConfigMapping().set_global(OPEN), (torch.tensor([1, 2]),), backend="reference",
        )
    )  # fmt: skip
    assert [(d.operators, d.quantized) for d in plan.decisions] == [(("Embedding",), False), (("linear",), True)]
    double = nn.Sequential(nn.Linear(4, 2)).double().eval()
    prepared = qcore.prepare_fx(
        double, QConfigMapping().set_global(OPEN), (torch.randn(2, 4, dtype=torch.float64),), backend="reference",
        on_unsupported="ignore",
    )  # fmt: skip
    assert qcore.explain(prepared).floating[0].reason == "input_1 is float64, not float32"


def test_a_weight_that_is_computed_stays_float():
    made = model(lambda m, x: F.linear(x, m.a.weight * x.mean()), a=nn.Linear(4, 4))
    prepared = prepare(made, shape=(2, 4), on_unsupported="ignore")
    (decision,) = (d for d in qcore.explain(prepared).decisions if d.operators == ("linear",))
    assert decision.reason == "its weight is computed, not a parameter"


def test_the_first_dtype_config_that_accepts_is_used():
    pattern = BackendPatternConfig(nn.Linear).add_dtype_config(DTypeConfig(torch.int8)).add_dtype_config(U8)
    assert {
        d.dtype_config for d in qcore.explain(prepare(LINEARS, shape=(2, 4), config=config(pattern))).decisions
    } == {U8}


NARROW = DTypeConfig(DTypeWithConstraints(torch.uint8, quant_max_upper_bound=127), torch.uint8, torch.int8)
EXPLICIT = QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=255), WEIGHT)


def test_a_later_dtype_config_is_used_if_the_first_can_not_read_what_comes_in():
    pattern = BackendPatternConfig(nn.Linear).set_dtype_configs([NARROW, U8])
    mapping = QConfigMapping().set_module_name("0", EXPLICIT).set_module_name("1", OPEN)
    plan = qcore.explain(prepare(LINEARS, mapping, (2, 4), config(pattern)))
    assert [d.dtype_config for d in plan.decisions] == [U8, U8]


def test_what_no_dtype_config_can_read_is_refused_and_leaves_its_producer_alone():
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8), BackendPatternConfig(nn.Linear).add_dtype_config(NARROW)
    )
    network = nn.Sequential(conv(), nn.Linear(6, 6)).eval()
    mapping = QConfigMapping().set_object_type(nn.Conv2d, EXPLICIT).set_object_type(nn.Linear, OPEN)
    problem = r"_0 is quantized otherwise than it must be read: input quant_max 255 > 127"
    with pytest.raises(qcore.errors.UnsupportedQConfigError, match=problem):
        prepare(network, mapping, config=made, on_unsupported="error")
    with pytest.warns(qcore.errors.UnsupportedQConfigWarning, match=problem):
        plan = qcore.explain(prepare(network, mapping, config=made))
    assert [d.quantized for d in plan.decisions] == [True, False]
    assert [t.quant_max for t in plan.qparams] == [255, 255]


def test_a_float_output_is_used_where_only_the_caller_reads_it():
    both = [DTypeConfig(torch.uint8, torch.float32, torch.int8), U8]
    made = config(BackendPatternConfig(nn.Linear).set_dtype_configs(both))
    prepared = prepare(LINEARS, shape=(2, 4), config=made)
    assert observed(prepared) == [("input_1", 0), ("_0", 1)]
    prepared(torch.randn(8, 4))
    assert qcore.convert_fx(prepared)(torch.randn(3, 4)).dtype == torch.float32
