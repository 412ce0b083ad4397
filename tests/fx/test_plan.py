"""What is decided for each operator and each value."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import (
    BackendConfig,
    BackendPatternConfig,
    Condition,
    DTypeConfig,
    DTypeWithConstraints,
    MinMaxObserver,
    ObservationType,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    QScheme,
)
from qcore.fx.observe import observer_nodes
from qcore.testing import ask_by_name

WEIGHT = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)
OPEN = QConfig(MinMaxObserver, WEIGHT)
U8 = DTypeConfig(torch.uint8, torch.uint8, torch.int8)


class Calls(nn.Module):
    """A model with a few layers whose forward is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def model(forward, **layers):
    return Calls(forward, **layers).eval()


def prepare(made, mapping=None, shape=(2, 4, 6, 6), config=None, **arguments):
    mapping = QConfigMapping().set_global(OPEN) if mapping is None else mapping
    backend = {} if config else {"backend": "reference"}
    return qcore.prepare_fx(made, mapping, (torch.randn(shape),), backend_config=config, **backend, **arguments)


def observed(prepared):
    """Observed values with the number of their observer, in the order of execution."""
    return [(node.args[0].name, number) for node, number in observer_nodes(prepared, qcore.explain(prepared).observers)]


def conv(**arguments):
    return nn.Conv2d(4, 4, 3, padding=1, **arguments)


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


@pytest.mark.parametrize(
    "move",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.flatten(1),
        lambda x: x.reshape(2, -1),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.chunk(2, 1)[0],
        lambda x: F.pad(x, (1, 1)),
        lambda x: x[:, :2],
    ],
)
def test_what_only_moves_elements_is_not_observed_again(move):
    prepared = prepare(model(lambda m, x: move(m.a(x)), a=conv()))
    assert observed(prepared) == [("x", 0), ("a", 1)]
    assert all(d.quantized for d in qcore.explain(prepared).decisions)


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


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "area", "bicubic"])
def test_only_bicubic_interpolation_leaves_the_range_of_its_input(installed_backend, mode):
    torch.manual_seed(0)
    made = model(lambda m, x: F.interpolate(m.a(x).relu(), scale_factor=3.0, mode=mode), a=conv())
    mapping, x = qcore.get_default_qconfig_mapping(installed_backend), torch.randn(2, 4, 6, 6)
    prepared = qcore.prepare_fx(made, mapping, (x,), on_unsupported="error")
    prepared(x)
    assert len(observed(prepared)) == (3 if mode == "bicubic" else 2)
    expected = made(x)
    assert (qcore.convert_fx(prepared)(x) - expected).norm() < 0.02 * expected.norm()


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


def config(*patterns):
    made = BackendConfig("test")
    for pattern in patterns:
        made.set_backend_pattern_config(pattern)
    return made


def linear_config(dtype_config):
    return config(BackendPatternConfig(nn.Linear).add_dtype_config(dtype_config))


LINEARS = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()


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


def test_fixed_qparams_come_from_the_kernel():
    made = nn.Sequential(conv(), nn.Sigmoid()).eval()
    prepared = prepare(made)
    prepared(torch.randn(2, 4, 6, 6))
    assert [v.item() for v in prepared.activation_post_process_2.calculate_qparams()] == [1 / 256, 0]


def test_a_pattern_with_a_condition_goes_before_one_without():
    is_depthwise = Condition("depthwise", lambda node: node.args[6] > 1)
    narrow = DTypeConfig(DTypeWithConstraints(torch.uint8, quant_max_upper_bound=127), torch.uint8, torch.int8)
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8),
        BackendPatternConfig(F.conv2d).set_condition(is_depthwise).add_dtype_config(narrow),
    )
    prepared = prepare(nn.Sequential(conv(), conv(groups=4)).eval(), config=made)
    plan = qcore.explain(prepared)
    assert [d.condition for d in plan.decisions] == ["", "depthwise"]
    assert [t.quant_max for t in plan.qparams] == [255, 127, 255]


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.a(x) + x, lambda m, x: x + m.a(x), lambda m, x: F.relu(torch.add(x, m.a(x)))]
)
def test_a_chain_is_one_operator_in_either_order(forward):
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8),
        BackendPatternConfig((nn.Conv2d, torch.add)).add_dtype_config(U8),
    )
    plan = qcore.explain(prepare(model(forward, a=conv()), config=made))
    (decision,) = plan.decisions
    assert decision.operators[:2] == ("conv2d", "add")
    assert len(plan.observations) == 2


@pytest.mark.parametrize(
    "forward", [lambda m, x: (lambda y: y + y)(m.a(x)), lambda m, x: m.a(x) + 1.0, lambda m, x: (m.a(x) + x, m.a(x))]
)
def test_what_is_no_residual_is_no_chain(forward):
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8), BackendPatternConfig(torch.add).add_dtype_config(U8),
        BackendPatternConfig((nn.Conv2d, torch.add)).add_dtype_config(U8),
    )  # fmt: skip
    plan = qcore.explain(prepare(model(forward, a=conv()), config=made))
    chains = [d.operators for d in plan.decisions]
    assert ("conv2d",) in chains


def test_an_observation_type_that_shares():
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8),
        BackendPatternConfig(torch.sin).set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT).add_dtype_config(U8),
    )  # fmt: skip
    plan = qcore.explain(prepare(model(lambda m, x: torch.sin(m.a(x)), a=conv()), config=made))
    assert plan.shared == {"sin": 1}


def test_a_float_output_is_used_where_only_the_caller_reads_it():
    both = [DTypeConfig(torch.uint8, torch.float32, torch.int8), U8]
    made = config(BackendPatternConfig(nn.Linear).set_dtype_configs(both))
    prepared = prepare(LINEARS, shape=(2, 4), config=made)
    assert observed(prepared) == [("input_1", 0), ("_0", 1)]
    prepared(torch.randn(8, 4))
    assert qcore.convert_fx(prepared)(torch.randn(3, 4)).dtype == torch.float32


def test_the_plan_prints_a_line_for_every_decision():
    plan = qcore.explain(prepare(nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2), nn.LogSoftmax(1)).eval()))
    text = plan.as_text(100)
    shares = "(100% of multiply-adds, 100% of weights)"
    saving = "it has no weights, and integers wouldn't save a conversion here"
    head = (
        f"reference: 1 of 3 operators on integers {shares}; 1 float: {saving}; 1 float: reference has no pattern for it"
    )
    assert plan.summary() == head
    assert text.splitlines()[:3] == [
        f"reference: 1 of 3 operators on integers {shares}", f"  1 float: {saving} (1)",
        "  1 float: reference has no pattern for it (2)",
    ]  # fmt: skip
    for part in ("conv2d + relu", "avg_pool2d", "LogSoftmax", "global"):
        assert part in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_and_loses_nothing(width):
    deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.LayerNorm(4))
    for name in ("attention_output_of_a_transformer", "encoder_layers", "bert_model"):
        deep = nn.Sequential(OrderedDict([(name, deep)]))
    mapping = QConfigMapping().set_global(OPEN).set_module_name_regex("bert_model[.]encoder_layers[.].*", OPEN)
    plan = qcore.explain(prepare(deep.eval(), mapping, (2, 4)))
    lines = plan.as_text(width).splitlines()
    assert max(map(len, lines)) <= width
    (rule,) = (line for line in lines if set(line) == {"-", " "})
    # What goes on in the next lines of a cell is all there.
    start = lines.index(rule) + 1
    ends = [len(rule[:at].rstrip()) for at in range(1, len(rule)) if rule[at - 1 : at + 1] == " -"]
    cells, before = [], 0
    for end in [*ends, len(rule)]:
        cells.append("".join(line[before:end] for line in lines[start:]).replace(" ", ""))
        before = end
    assert cells[0] == "linear+relu6[readbyanoperator]LayerNorm"
    path = "bert_model.encoder_layers.attention_output_of_a_transformer"
    assert cells[1] == f"{path}.0{path}.2"
    assert cells[3] == "module_name_regex'bert_model[.]encoder_layers[.].*'" * 2
    assert cells[4] == ("referencereferencehasnopatternforit" if width == 200 else "reference(1)")


def test_printing_is_as_wide_as_the_terminal(monkeypatch):
    plan = qcore.explain(prepare(nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(1)).eval(), shape=(2, 4)))
    for columns, width in ((80, 80), (20, 60), (150, 150)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert str(plan) == plan.as_text(width)
