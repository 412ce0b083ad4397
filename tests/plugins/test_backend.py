"""A plugin's hooks behind one class, each called in one place, once where it is asked once, and held to its answer."""

import contextlib
import functools
import sys
import threading
import time

import pytest
from torch import nn

import qcore
from qcore import errors
from qcore.fx.record import record_of
from qcore.lowering import Lowered
from qcore.plugins.backend import Backend
from qcore.plugins.entry_points import InstalledBackend
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo
from tests.plugins.toys import INPUTS, config, fail, mapping, plugin, prepared


def test_without_lowering_the_reference_model_runs(install):
    install("toy", plugin())
    model = prepared("toy")
    model(*INPUTS)
    assert record_of(qcore.convert_fx(model)).stage == "reference"


def test_the_lowering_gets_the_reference_model_and_gives_the_result(install):
    seen = []

    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    def lower(model):
        seen.append(record_of(model).stage)
        return Lowered(Compiled(model))

    install("toy", plugin(qcore_lower=lower))
    model = prepared("toy")
    model(*INPUTS)
    assert isinstance(qcore.convert_fx(model), Compiled)
    assert seen == ["reference"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qcore_prob": lambda: None}, "unknown hook"),
        ({"qcore_lower": lambda model, speed: None}, "speed"),
        ({"qcore_probe": None}, "doesn't implement qcore_probe"),
        ({"qcore_backend_info": lambda: BackendInfo("toy", PLUGIN_API + 1)}, f"plugin API {PLUGIN_API + 1}"),
        ({"qcore_backend_info": lambda: BackendInfo("other", PLUGIN_API)}, "calls itself 'other'"),
    ],
    ids=["misspelt hook", "unknown argument", "missing hook", "other API", "other name"],
)
def test_a_plugin_that_does_not_fit_is_refused(install, changes, message):
    install("toy", plugin(**changes))
    with pytest.raises(errors.PluginError, match=message):
        qcore.get_backend("toy")


def test_a_backend_that_this_machine_cannot_run_says_why(install):
    install("toy", plugin(qcore_probe=lambda: Availability(False, "no toy chip on the bus")))
    with pytest.raises(errors.BackendUnavailableError, match="'toy' can't run on this machine: no toy chip"):
        prepared("toy")


def test_observer_kernels_of_a_backend_stand_in_for_the_cores(install):
    class Own(qcore.HistogramObserver):
        pass

    install("toy", plugin(qcore_observers=lambda: {qcore.HistogramObserver: Own}))
    model = prepared("toy")
    assert {type(m) for m in model.modules() if isinstance(m, qcore.ObserverBase)} == {Own}
    model(*INPUTS)
    assert qcore.convert_fx(model)(*INPUTS).shape == (2, 4)


def test_a_backend_checks_its_plugin_without_an_entry_point():
    installed = InstalledBackend("toy", "nowhere", "qcore-toy", "0")
    assert Backend(installed, plugin()).info.name == "toy"


@pytest.mark.parametrize(
    "attribute",
    [lambda: None, functools.partial(print), 3],
    ids=["a function", "what pluggy doesn't take as one", "a value"],
)
def test_a_hook_without_its_mark_is_refused(attribute):
    module = plugin()
    module.qcore_observers = attribute
    with pytest.raises(errors.PluginError, match="qcore_observers isn't marked with @hookimpl"):
        Backend(InstalledBackend("toy", "nowhere", "qcore-toy", "0"), module)
    module = plugin()
    module.qcore_version, module.qcore_fx = "1", sys  # What a module imports.
    Backend(InstalledBackend("toy", "nowhere", "qcore-toy", "0"), module)


def test_the_cause_of_a_failing_hook_is_chained(install):
    install("toy", plugin(qcore_probe=fail))
    with pytest.raises(errors.PluginError) as caught:
        prepared("toy")
    assert repr(caught.value.__cause__) == "KeyError('boom')"


def test_a_condition_that_fails_is_named_with_its_plugin(install):
    conditional = config(nn.Linear, condition=qcore.Condition("wide", fail))
    install("toy", plugin(qcore_backend_config=lambda: conditional))
    with pytest.raises(errors.PluginError, match=r"'toy' \(qcore-toy 1.2.3\).*condition 'wide' .* on node '_0'"):
        prepared("toy")
    with pytest.raises(errors.PluginError, match="^the condition 'wide'"):  # One's own is nobody else's fault.
        prepared("toy", backend_config=conditional)


def test_a_user_s_own_config_is_held_to_the_same():
    with pytest.raises(errors.ConfigError, match="did you mean 'relu'?"):
        prepared(backend_config=config(nn.Linear, "rleu"))


def test_to_interrupt_a_hook_is_no_fault_of_its_plugin(install):
    def interrupted():
        raise KeyboardInterrupt

    install("toy", plugin(qcore_probe=interrupted))
    with pytest.raises(KeyboardInterrupt):
        prepared("toy")


def test_a_delegate_is_compared_with_the_reference_however_the_model_is_called(install):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair, *, scale, mask=None):
            return {"y": self.linear(pair[0]) * scale + pair[1]}

    class Delegate(nn.Module):
        def __init__(self, model, factor):
            super().__init__()
            self.model, self.factor = model, factor

        def forward(self, *args, **kwargs):
            return {"y": self.model(*args, **kwargs)["y"] * self.factor}

    call = (((INPUTS[0], INPUTS[0]),), {"scale": 2.0})
    for factor, expectation in ((1.0, contextlib.nullcontext()), (-1.0, pytest.raises(errors.LoweringError))):
        name = f"toy{int(factor) + 1}"
        install(name, plugin(name, qcore_lower=lambda model, factor=factor: Lowered(Delegate(model, factor))))
        model = qcore.prepare_fx(Called().eval(), qcore.get_default_qconfig_mapping(name), call)
        model(*call[0], **call[1])
        with expectation:
            assert isinstance(qcore.convert_fx(model), Delegate)


def test_what_a_plugin_hands_out_is_the_caller_s_to_change(install):
    own_mapping, own_config = mapping(qcore.default_observer), config(nn.Linear)
    install(
        "toy",
        plugin(qcore_default_qconfig_mapping=lambda version: own_mapping, qcore_backend_config=lambda: own_config),
    )
    qcore.get_default_qconfig_mapping("toy").set_global(None)
    changed = qcore.get_backend("toy").backend_config()
    assert changed == own_config
    changed.configs[0].add_dtype_config(qcore.DTypeConfig(is_dynamic=True))
    changed.set_backend_pattern_config(qcore.BackendPatternConfig(nn.ReLU).add_dtype_config(qcore.DTypeConfig()))
    assert qcore.get_default_qconfig_mapping("toy").global_qconfig is not None
    assert (len(own_config.configs), len(own_config.configs[0].dtype_configs), own_mapping.backend) == (1, 1, None)


def test_threads_that_ask_first_get_one_backend_that_was_probed_once(install):
    probes = []

    def probe():
        time.sleep(0.05)
        probes.append(threading.get_ident())
        return Availability(True)

    install("toy", plugin(qcore_probe=probe))
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        backend = qcore.get_backend("toy")
        assert backend.availability.ok
        found.append(backend)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    assert len(probes) == 1
