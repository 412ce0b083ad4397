"""How plugins are found, loaded and refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qcore
from qcore import errors
from qcore.plugins import entry_points, manager
from qcore.plugins.entry_points import InstalledBackend
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.plugins.manager import Backend


def plugin(name="toy", **changes):
    """A minimal plugin as an object; ``changes`` replace hooks, ``None`` leaves one out."""
    reference = sys.modules["qcore.plugins.reference"]
    hooks = {
        "qcore_backend_info": lambda: BackendInfo(name, PLUGIN_API),
        "qcore_probe": lambda: Availability(True, isa="any"),
        "qcore_backend_config": lambda: reference.qcore_backend_config(),
        "qcore_default_qconfig_mapping": lambda version: reference.qcore_default_qconfig_mapping(version),
        **changes,
    }
    return SimpleNamespace(**{key: hookimpl(function) for key, function in hooks.items() if function is not None})


@pytest.fixture
def install(monkeypatch):
    """Makes objects appear as the modules of installed backends."""
    added = []

    def add(name, module, aliases=()):
        path = f"qcore_test_{name}"
        monkeypatch.setitem(sys.modules, path, module)
        added.append(InstalledBackend(name, path, f"qcore-{name}", "1.2.3", aliases))
        return added[-1]

    real = entry_points.installed_backends
    monkeypatch.setattr(manager, "installed_backends", lambda: (*real(), *added))
    manager._load.cache_clear()
    qcore.get_backend("reference")
    yield add
    manager._load.cache_clear()


MODEL = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
INPUTS = (torch.randn(2, 4),)


def prepared(backend=None, **arguments):
    mapping = qcore.get_default_qconfig_mapping("reference")
    mapping.backend = None
    return qcore.prepare_fx(MODEL, mapping, INPUTS, backend=backend, **arguments)


def test_the_reference_backend_is_always_installed():
    found = next(b for b in qcore.installed_backends() if b.name == "reference")
    assert found.distribution == "qcore-fx"
    assert qcore.get_backend("reference").availability.ok


def test_a_plugin_is_asked_for_by_name_and_by_alias(install):
    install("toy", plugin(), aliases=("toy_alias",))
    assert qcore.get_backend("toy") is qcore.get_backend("toy_alias")
    assert qcore.get_default_qconfig_mapping("toy_alias").backend == "toy"


def test_without_lowering_the_reference_model_runs(install):
    install("toy", plugin())
    model = prepared("toy")
    model(*INPUTS)
    assert qcore.convert_fx(model).preparation.stage == "reference"


def test_the_lowering_gets_the_reference_model_and_gives_the_result(install):
    seen = []

    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    def lower(model):
        seen.append(model.preparation.stage)
        return Compiled(model)

    install("toy", plugin(qcore_lower=lower))
    model = prepared("toy")
    model(*INPUTS)
    assert isinstance(qcore.convert_fx(model), Compiled)
    assert seen == ["reference"]


def test_a_backend_that_is_not_installed_is_named_with_those_that_are():
    with pytest.raises(
        errors.BackendNotFoundError, match=r"no backend 'my_chip'.*reference.*pip install qcore-my-chip"
    ):
        prepared("my_chip")


def test_a_disabled_plugin_counts_as_not_installed(install, monkeypatch):
    install("toy", plugin())
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "other, toy")
    with pytest.raises(errors.BackendNotFoundError):
        qcore.get_backend("toy")


def test_a_plugin_that_fails_to_import_is_named_with_cause_and_cure(install, monkeypatch):
    install("toy", plugin())
    install("broken", None)
    monkeypatch.delitem(sys.modules, "qcore_test_broken")
    with pytest.raises(errors.PluginError) as caught:
        prepared("broken")
    for part in ("'broken'", "qcore-broken 1.2.3", "ModuleNotFoundError", qcore.__version__, torch.__version__,
                 "QCORE_DISABLE_PLUGINS=broken"):  # fmt: skip
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert prepared("toy")  # Another backend doesn't suffer.


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


def test_lowering_that_fails_or_gives_nothing_usable_is_named(install):
    def fail(model):
        raise RuntimeError("boom")

    for name, lower, message in (("a", fail, "boom"), ("b", lambda model: 3, "returned int")):
        install(name, plugin(name, qcore_lower=lower))
        model = prepared(name)
        model(*INPUTS)
        with pytest.raises(errors.LoweringError, match=message):
            qcore.convert_fx(model)


def test_no_backend_given_takes_the_one_whose_mapping_was_asked_for(install):
    install("toy", plugin())
    mapping = qcore.get_default_qconfig_mapping("toy").set_object_type(nn.ReLU, None)
    assert qcore.prepare_fx(MODEL, mapping, INPUTS).preparation.backend == "toy"


def test_no_backend_and_no_default_mapping_takes_the_best_available(install):
    best = BackendInfo("best", PLUGIN_API, priority=1000)
    better = BackendInfo("better", PLUGIN_API, priority=2000)
    install("best", plugin("best", qcore_backend_info=lambda: best))
    install(
        "better", plugin("better", qcore_backend_info=lambda: better, qcore_probe=lambda: Availability(False, "no"))
    )
    assert prepared().preparation.backend == "best"
    assert qcore.get_default_qconfig_mapping().backend == "best"


def test_a_broken_plugin_does_not_stop_the_choice_of_the_best(install, monkeypatch):
    install("broken", None)
    monkeypatch.delitem(sys.modules, "qcore_test_broken")
    with pytest.warns(errors.QcoreWarning, match="left out.*'broken'"):
        assert prepared().preparation.backend != "broken"


def test_a_backend_config_of_ones_own_goes_to_the_reference_backend(install):
    install("best", plugin("best", qcore_backend_info=lambda: BackendInfo("best", PLUGIN_API, priority=1000)))
    config = qcore.BackendConfig("mine").set_backend_pattern_config(
        qcore.BackendPatternConfig(nn.Linear).add_dtype_config(qcore.DTypeConfig())
    )
    preparation = prepared(backend_config=config).preparation
    assert (preparation.backend, preparation.backend_config) == ("reference", config)


def test_a_mapping_of_another_backend_is_pointed_out(install):
    install("toy", plugin())
    with pytest.warns(errors.UnsupportedQConfigWarning, match="default of backend 'reference'.*'toy'"):
        qcore.prepare_fx(MODEL, qcore.get_default_qconfig_mapping("reference"), INPUTS, backend="toy")


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
