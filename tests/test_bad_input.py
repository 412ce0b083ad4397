"""Every mistake gets an error of qcore's own, before calibration: what was asked, what was found, what to do."""

import copy
import os
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import MinMaxObserver, QConfig, QConfigMapping, errors
from tests.small import INPUTS, INT8, calibrated, model, prepare

TORCH_AO_IS_BLOCKED = bool(os.environ.get("QCORE_TESTS_BLOCK_TORCH_AO"))


def test_a_call_number_that_does_not_exist():
    mapping = QConfigMapping().set_module_name_object_type_order("", nn.Linear, 7, INT8)
    with pytest.raises(errors.ConfigError, match=r"order\('', Linear, 7\) matches no call"):
        prepare(mapping=mapping)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 5),), r"doesn't run on example_inputs=\(float32\[2, 5\]\): "),
        ((), r"doesn't run on example_inputs=\(\): .*missing 1 required positional argument"),
        ((torch.randn(2, 4), torch.randn(1)), r"float32\[2, 4\], float32\[1\]\): .*takes 2 positional arguments"),
        ({"y": torch.randn(2, 4)}, r"example_inputs=\(y=float32\[2, 4\]\): .*unexpected keyword argument 'y'"),
    ],
    ids=["wrong shape", "too few", "too many", "wrong name"],
)
def test_example_inputs_that_the_model_rejects(inputs, message):
    with pytest.raises(errors.ExampleInputsError, match=message):
        prepare(inputs=inputs)


def test_example_inputs_without_their_tuple():
    with pytest.raises(errors.ConfigError, match=r"found Tensor; write \(x,\) for one input"):
        prepare(inputs=torch.randn(2, 4))


class Undecided(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


@pytest.mark.parametrize("traceable", [True, False])
def test_a_model_in_which_nothing_can_be_quantized_says_why(traceable):
    made = nn.Sequential(nn.Identity(), nn.LogSoftmax(1) if traceable else Undecided()).eval()
    with pytest.raises(errors.NothingToQuantizeError) as caught:
        prepare(made, on_unsupported="error")
    with pytest.warns(errors.UnsupportedQConfigWarning) as warned:
        prepared = prepare(made)
    for message in (str(caught.value), str(warned[0].message)):
        assert "nothing in Sequential can be quantized" in message
        if traceable:
            assert "LogSoftmax at 1: reference has no pattern for it" in message
        else:
            assert "it decides by the data in gt" in message and "if x.sum() > 0" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = prepare(made, on_unsupported="ignore")
    for found in (prepared, ignored):
        (decision,) = qcore.explain(found).decisions
        assert not decision.quantized and decision.reason
        assert torch.equal(found(INPUTS[0]), made(INPUTS[0]))
        assert torch.equal(qcore.convert_fx(found)(INPUTS[0]), made(INPUTS[0]))


def test_fusing_a_model_that_cannot_be_traced_names_submodule_and_line():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Identity(), Undecided())).eval()
    with pytest.raises(errors.TraceError) as caught:
        qcore.fuse_fx(module)
    assert caught.value.module_path == "1.1"
    assert "'1.1' (Undecided)" in str(caught.value)
    assert "test_bad_input.py" in str(caught.value) and "if x.sum() > 0" in str(caught.value)
    assert "set_non_traceable_module_names(['1.1'])" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.module_path, again.reason, str(again)) == ("1.1", caught.value.reason, str(caught.value))
    custom = qcore.PrepareCustomConfig().set_non_traceable_module_names(["1.1"])
    assert prepare(module, prepare_custom_config=custom)(*INPUTS).shape == (2, 4)  # What the message says helps.


WIDE = QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=255), INT8.weight)


def narrow_config():
    narrow = qcore.DTypeWithConstraints(torch.uint8, quant_max_upper_bound=127)
    return qcore.BackendConfig("narrow").set_backend_pattern_config(
        qcore.BackendPatternConfig(nn.Linear).add_dtype_config(qcore.DTypeConfig(narrow, torch.uint8, torch.int8))
    )


def prepare_unsupported(on_unsupported):
    return qcore.prepare_fx(
        model(), QConfigMapping().set_object_type(nn.Linear, WIDE), INPUTS, backend_config=narrow_config(),
        on_unsupported=on_unsupported,
    )  # fmt: skip


def test_a_qconfig_that_the_backend_does_not_accept_names_the_constraint():
    where = r"linear \+ relu at 0 \(rule object_type Linear\)"
    reason = rf"{where}.*narrow doesn't accept its qconfig: input quant_max 255 > 127 \(quant_max_upper_bound\)"
    with pytest.raises(errors.UnsupportedQConfigError, match=reason) as caught:
        prepare_unsupported("error")
    assert len(caught.value.problems) == 2
    with pytest.warns(errors.UnsupportedQConfigWarning, match=reason):
        prepare_unsupported("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = qcore.explain(prepare_unsupported("ignore"))
    assert [d.quantized for d in plan.decisions] == [False, False]
    assert "quant_max_upper_bound" in plan.decisions[0].reason


def test_an_operator_named_in_the_mapping_that_the_backend_does_not_know():
    class Cumulated(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    mapping = QConfigMapping().set_object_type(torch.cumsum, INT8)
    with pytest.raises(errors.UnsupportedQConfigError, match="cumsum.*reference has no pattern for it"):
        prepare(Cumulated().eval(), mapping, on_unsupported="error")


def test_observers_that_saw_no_data_are_named():
    prepared = prepare()
    with pytest.raises(
        errors.CalibrationError, match="3 of 3 observers saw no data: activation_post_process_0"
    ) as caught:
        qcore.convert_fx(prepared)
    assert caught.value.observers == tuple(f"activation_post_process_{n}" for n in range(3))


def test_values_that_are_not_finite_are_reported_by_observer_and_count():
    prepared = prepare()
    prepared(*INPUTS)
    prepared(torch.tensor([[1.0, float("nan"), 2.0, float("inf")]]))
    with pytest.warns(errors.CalibrationWarning, match="activation_post_process_0 met 2 NaN or infinite values"):
        converted = qcore.convert_fx(prepared)
    assert torch.isfinite(converted(*INPUTS)).all()
    assert "activation_post_process_0 met 2" in str(qcore.explain(converted))


def test_a_weight_that_is_not_finite():
    module = model()
    module[0].weight.data[0, 0] = float("nan")
    prepared = prepare(module, mapping=QConfigMapping().set_module_name("0", INT8))
    for observer in (m for m in prepared.modules() if isinstance(m, qcore.ObserverBase)):
        observer(torch.randn(4))
    with pytest.raises(errors.ConfigError, match=r"weight 0\.weight holds NaN"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qcore.convert_fx(prepared)


@pytest.mark.parametrize(
    "call",
    [
        lambda: prepare(_equalization_config=QConfigMapping()),
        lambda: qcore.PrepareCustomConfig().set_standalone_module_name("0", None, (), None, None),
        lambda: qcore.PrepareCustomConfig().set_float_to_observed_mapping(nn.Linear, nn.Linear),
        lambda: qcore.PrepareCustomConfig().set_input_quantized_indexes([0]),
        lambda: qcore.PrepareCustomConfig().set_output_quantized_indexes([0]),
        lambda: qcore.ConvertCustomConfig().set_observed_to_quantized_mapping(nn.Linear, nn.Linear),
        lambda: qcore.convert_fx(prepare(), qconfig_mapping=QConfigMapping()),
        lambda: qcore.convert_fx(prepare(), _remove_qconfig=False),
        lambda: qcore.convert_fx(calibrated(), keep_original_weights=True),
        lambda: qcore.fuse_fx(model(), backend_config=qcore.BackendConfig()),
        lambda: qcore.BackendPatternConfig(nn.Linear).set_root_module(nn.Linear),
        lambda: qcore.BackendPatternConfig(nn.Linear).set_fuser_method(lambda *a: None),
    ],
)
def test_what_is_not_supported_yet_says_so_and_is_never_ignored(call):
    with pytest.raises(errors.NotSupportedError, match=r".{20}"):
        call()


@pytest.mark.parametrize("wrong", [model(), qcore.fuse_fx(model()), "a string"], ids=["float", "fused", "text"])
def test_converting_what_prepare_did_not_make(wrong):
    with pytest.raises(errors.ConfigError, match="convert_fx needs what prepare_fx returned"):
        qcore.convert_fx(wrong)


def test_converting_twice_over_says_which_stage_it_is():
    with pytest.raises(errors.ConfigError, match="found a reference model"):
        qcore.convert_fx(qcore.convert_fx(calibrated()))


def test_another_backend_config_at_convert():
    with pytest.raises(errors.ConfigError, match="another backend_config"):
        qcore.convert_fx(calibrated(), backend_config=narrow_config())


@pytest.mark.parametrize("version", [1, 99, -1, "0", None, 0.0, True])
def test_a_version_of_a_default_mapping_that_there_is_not(installed_backend, version):
    with pytest.raises(errors.ConfigError, match=f"{installed_backend}.*has no version .*; it has: 0"):
        qcore.get_default_qconfig_mapping(installed_backend, version=version)


def test_explaining_a_model_that_qcore_did_not_make():
    with pytest.raises(errors.ConfigError, match="explain needs a model that prepare_fx or convert_fx returned"):
        qcore.explain(nn.Linear(1, 1))


def test_dropping_is_never_silent():
    """Whatever isn't quantized has a reason in the plan."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.relu(self.linear(torch.sin(x))).cumsum(1)

    plan = qcore.explain(prepare(Mixed().eval()))
    assert all(d.quantized or d.reason for d in plan.decisions)
    assert len(plan.floating) == 2


@pytest.mark.parametrize(
    "value", [None, [INPUTS[0]], 3, "text", {"x": INPUTS[0]}], ids=["None", "list", "int", "str", "dict"]
)
def test_an_argument_that_is_no_tensor_is_named(installed_backend, value):
    mapping = qcore.get_default_qconfig_mapping(installed_backend)
    prepared = qcore.prepare_fx(model(), mapping, INPUTS)
    found = "None" if value is None else f"a {type(value).__name__}"
    message = f"argument input of .*: {found}; the model was prepared with a tensor of torch.float32"
    with pytest.raises(errors.GuardError, match=message):
        prepared(value)
    prepared(*INPUTS)
    for converted in (qcore.convert_fx(prepared), qcore.convert_to_reference_fx(prepared)):
        for _ in range(4):
            converted(*INPUTS)
        with pytest.raises(errors.GuardError, match=message):
            converted(value)
        with pytest.raises(errors.GuardError, match=message):
            converted(input=value)


class Holds(nn.Module):
    """Decides by data, so that it stays Python."""

    def __init__(self, inner, decides=True):
        super().__init__()
        self.inner, self.linear, self.decides = inner, nn.Linear(2, 2), decides

    def forward(self, x):
        y = self.linear(self.inner(x))
        return -y if self.decides and y.sum() > 1e9 else y


def prepared_models():
    prepared, holding = prepare(), prepare(Holds(model()).eval())
    for made in (prepared, holding):
        made(*INPUTS)
    fallback = prepare(prepare_custom_config=qcore.PrepareCustomConfig().set_guard_failure("float"))
    converted = [qcore.convert_fx(prepared), qcore.convert_to_reference_fx(prepared), qcore.convert_fx(holding)]
    return [prepared, holding, fallback, *converted]


def test_a_model_that_is_or_holds_a_prepared_or_converted_one():
    for made in prepared_models():
        for given, where in ((made, "it"), (Holds(made).eval(), "its module 'inner")):
            with pytest.raises(errors.ConfigError, match=f"model: {where}.* already; give the float model"):
                prepare(given)
            with pytest.raises(errors.ConfigError, match=f"model: {where}.* already; give the float model"):
                qcore.fuse_fx(given)
    assert prepare(qcore.fuse_fx(model()))(*INPUTS).shape == (2, 2)  # That isn't prepared yet.


@pytest.mark.skipif(TORCH_AO_IS_BLOCKED, reason="torch's own compiler and jit.trace import torch.ao")
def test_a_script_module_has_no_python_to_trace():
    for given in (torch.jit.script(model()), torch.jit.trace(model(), INPUTS)):
        with pytest.raises(
            errors.ConfigError, match="no Python to trace in a ScriptModule; give the module that it was"
        ):
            prepare(given)
        for decides in (False, True):
            holding = Holds(given, decides).eval()
            prepared = prepare(holding)
            assert isinstance(prepared, torch.fx.GraphModule) != decides
            assert torch.allclose(prepared(*INPUTS), holding(*INPUTS), atol=1e-6)
            assert "inner" in str(qcore.explain(prepared)) and "no Python to trace" in str(qcore.explain(prepared))


@pytest.mark.skipif(TORCH_AO_IS_BLOCKED, reason="torch's own compiler and jit.trace import torch.ao")
@torch.no_grad()
def test_torch_compile_around_a_model_or_a_module_of_it_is_left_out():
    plain = model()
    inside = copy.deepcopy(plain)
    inside.compile()
    for given, expected in ((torch.compile(plain), plain(*INPUTS)), (inside, plain(*INPUTS))):
        prepared = prepare(given)
        assert [d.path for d in qcore.explain(prepared).quantized if d.weights] == ["0", "2"]
        assert torch.equal(prepared(*INPUTS), expected)
    for decides in (False, True):
        holding = Holds(torch.compile(plain), decides).eval()
        prepared = prepare(holding)
        paths = {d.path for d in qcore.explain(prepared).quantized if d.weights}
        assert paths == {"inner.0", "inner.2", "linear"}
        assert torch.allclose(prepared(*INPUTS), holding.linear(plain(*INPUTS)), atol=1e-6)
        assert (qcore.convert_fx(prepared)(*INPUTS) - holding.linear(plain(*INPUTS))).norm() < 0.1


def test_a_lazy_module_that_has_no_weights_yet():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU()).eval()
    with pytest.raises(errors.ConfigError, match="parameter '0.weight' isn't initialized yet; run the model once"):
        prepare(lazy)
    lazy(*INPUTS)
    assert prepare(lazy)(*INPUTS).shape == (2, 4)
