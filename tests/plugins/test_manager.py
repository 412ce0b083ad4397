"""How plugins are found, loaded and refused."""

import sys
import warnings

import pytest
import torch
from torch import nn

import qcore
from qcore import errors
from qcore.fx.record import record_of
from qcore.plugins import manager
from qcore.plugins.answers import ANSWERS
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo
from tests.plugins.toys import INPUTS, MODEL, fail, leave, mapping, nothing, plugin, prepared


def test_a_plugin_is_asked_for_by_name_and_by_alias(install):
    install("toy", plugin(), aliases=("toy_alias",))
    assert qcore.get_backend("toy") is qcore.get_backend("toy_alias")
    assert qcore.get_default_qconfig_mapping("toy_alias").backend == "toy"


def test_a_backend_that_is_not_installed_is_named_with_those_that_are():
    with pytest.raises(
        errors.BackendNotFoundError, match=r"no backend 'my_chip'.*reference.*pip install qcore-my-chip"
    ):
        prepared("my_chip")


def test_a_disabled_plugin_counts_as_not_installed(install, monkeypatch):
    install("toy", plugin(), aliases=("toy_alias",))
    install("other", plugin("other"))
    for disabled in ("other, toy", "toy_alias", "QCORE_toy"):  # By name, by alias, by distribution.
        monkeypatch.setenv("QCORE_DISABLE_PLUGINS", disabled)
        with pytest.raises(errors.BackendNotFoundError, match=r"'toy' \(qcore-toy 1.2.3\) is disabled by QCORE_DIS"):
            qcore.get_backend("toy_alias")
    assert qcore.get_backend("other").name == "other"


def test_a_name_that_disables_nothing_is_warned_of_once(install, monkeypatch):
    install("toy", plugin())
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "tpy, qcore-nothing-like-it")
    with pytest.warns(errors.QcoreWarning) as caught:
        qcore.get_backend("toy")
    assert "no backend 'tpy' is installed; did you mean 'toy'?" in str(caught[0].message)
    assert "'qcore-nothing-like-it' is installed; installed are: " in str(caught[1].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcore.get_backend("toy")


def test_the_reference_backend_can_not_be_disabled(monkeypatch):
    names = [name for found in qcore.installed_backends() for name in (found.name, *found.aliases)]
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", ",".join(names))
    with pytest.warns(errors.QcoreWarning, match="'reference' can't be disabled"):
        assert record_of(prepared()).settings.backend == "reference"
    assert manager.backend_names() == ["reference"]


def test_a_plugin_that_fails_to_import_is_named_with_cause_and_cure(install, monkeypatch):
    install("toy", plugin())
    monkeypatch.delitem(sys.modules, install("broken", None).module)
    with pytest.raises(errors.PluginError) as caught:
        prepared("broken")
    for part in ("'broken'", "qcore-broken 1.2.3", "ModuleNotFoundError", qcore.__version__, torch.__version__,
                 "QCORE_DISABLE_PLUGINS=broken"):  # fmt: skip
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert prepared("toy")  # Another backend doesn't suffer.


def test_no_backend_given_takes_the_one_whose_mapping_was_asked_for(install):
    install("toy", plugin())
    mapping = qcore.get_default_qconfig_mapping("toy").set_object_type(nn.ReLU, None)
    assert record_of(qcore.prepare_fx(MODEL, mapping, INPUTS)).settings.backend == "toy"


def test_no_backend_and_no_default_mapping_takes_the_best_available(install):
    best = BackendInfo("best", PLUGIN_API, priority=1000)
    better = BackendInfo("better", PLUGIN_API, priority=2000)
    install("best", plugin("best", qcore_backend_info=lambda: best))
    install(
        "better", plugin("better", qcore_backend_info=lambda: better, qcore_probe=lambda: Availability(False, "no"))
    )
    assert record_of(prepared()).settings.backend == "best"
    assert qcore.get_default_qconfig_mapping().backend == "best"


def test_a_broken_plugin_does_not_stop_the_choice_of_the_best(install, monkeypatch):
    monkeypatch.delitem(sys.modules, install("broken", None).module)
    with pytest.warns(errors.QcoreWarning, match="left out.*'broken'"):
        assert record_of(prepared()).settings.backend != "broken"


def test_a_backend_config_of_ones_own_goes_to_the_reference_backend(install):
    install("best", plugin("best", qcore_backend_info=lambda: BackendInfo("best", PLUGIN_API, priority=1000)))
    config = qcore.BackendConfig("mine").set_backend_pattern_config(
        qcore.BackendPatternConfig(nn.Linear).add_dtype_config(qcore.DTypeConfig())
    )
    settings = record_of(prepared(backend_config=config)).settings
    assert (settings.backend, settings.backend_config) == ("reference", config)


def test_a_mapping_of_another_backend_is_pointed_out(install):
    install("toy", plugin())
    with pytest.warns(errors.UnsupportedQConfigWarning, match="default of backend 'reference'.*'toy'"):
        qcore.prepare_fx(MODEL, qcore.get_default_qconfig_mapping("reference"), INPUTS, backend="toy")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [("toi", "did you mean 'toy'?"), ("toy-Alias", "did you mean 'Toy_alias'?"), ("zzz", "pip install qcore-zzz")],
)
def test_a_misspelt_backend_is_asked_about_and_an_unknown_one_to_be_installed(install, asked, answer):
    install("toy", plugin(), aliases=("Toy_alias",))
    with pytest.raises(errors.BackendNotFoundError) as caught:
        prepared(asked)
    assert str(caught.value).endswith(answer)


def test_a_backend_is_asked_for_by_a_string():
    with pytest.raises(errors.ConfigError, match="the name of a backend, found int"):
        prepared(3)


def test_the_name_of_a_backend_goes_before_any_alias(install, monkeypatch):
    install("another", plugin("another"), aliases=("toy", "reference"))
    install("toy", plugin())
    assert qcore.get_backend("toy").name == "toy"
    assert qcore.get_backend("reference").installed.distribution == "qcore-fx"
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "toy")  # Nor does the alias take over then.
    with pytest.raises(errors.BackendNotFoundError, match="'toy' .* is disabled"):
        qcore.get_backend("toy")


def test_two_distributions_of_one_backend_are_named_when_it_is_asked_for(install, monkeypatch):
    install("toy", plugin())
    install("toy", plugin(), distribution="their-toy")
    install("other", plugin("other"))
    with pytest.raises(errors.PluginError, match=r"qcore-toy 1.2.3.* and 'toy' .their-toy 1.2.3.*PLUGINS=their-toy"):
        prepared("toy")
    assert record_of(prepared("other")).settings.backend == "other"
    with pytest.warns(errors.QcoreWarning, match="left out.*qcore-toy.*their-toy"):
        assert record_of(prepared()).settings.backend != "toy"
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "their-toy")
    assert qcore.get_backend("toy").installed.distribution == "qcore-toy"


def test_two_backends_of_one_alias_are_named_when_it_is_asked_for(install, monkeypatch):
    install("first", plugin("first"), aliases=("fast",))
    install("second", plugin("second"), aliases=("fast",))
    with pytest.raises(errors.PluginError, match=r"answer to 'fast': 'first' .* and 'second' .*PLUGINS=second"):
        prepared("fast")
    assert qcore.get_backend("first").name == "first"
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "second")
    assert qcore.get_backend("fast").name == "first"


@pytest.mark.parametrize("choose", [prepared, qcore.get_default_qconfig_mapping], ids=["prepare_fx", "mapping"])
@pytest.mark.parametrize("hook", [hook for hook in ANSWERS if hook != "qcore_lower"])
@pytest.mark.parametrize("answer", [fail, leave, nothing, lambda **_: {"a": 1}], ids=["fail", "exit", "None", "dict"])
def test_the_choice_of_a_default_goes_on_without_what_fails(install, choose, hook, answer):
    info = BackendInfo("broken", PLUGIN_API, priority=1000)
    install("broken", plugin("broken", **{"qcore_backend_info": lambda: info, hook: answer}))
    install("sound", plugin("sound", qcore_backend_info=lambda: BackendInfo("sound", PLUGIN_API, priority=900)))
    with pytest.warns(errors.QcoreWarning, match=rf"left out.*'broken' \(qcore-broken 1.2.3\).*{hook}"):
        found = choose()
    assert (record_of(found).settings.backend if choose is prepared else found.backend) == "sound"
    with pytest.raises(errors.PluginError, match=f"'broken'.*{hook}"):
        qcore.prepare_fx(MODEL, qcore.get_default_qconfig_mapping("broken"), INPUTS, backend="broken")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("import sys; sys.exit(1)", "SystemExit: 1"),
        ("import torch; torch.zeros(2) @ torch.zeros(3)", "RuntimeError: "),
        ("x = 3", "doesn't implement qcore_backend_info"),
        ("def qcore_probe(): pass", "qcore_probe isn't marked with @hookimpl"),
        ("syntax error", "SyntaxError"),
    ],
)
def test_the_choice_of_a_default_goes_on_without_what_cannot_be_loaded(on_disk, code, message):
    on_disk("aa-broken", "broken = broken_module", module="broken_module", code=code)
    try:
        with pytest.warns(errors.QcoreWarning, match=rf"left out.*'broken' \(aa-broken 1.2.3\).*{message}"):
            assert record_of(prepared()).settings.backend != "broken"
        with pytest.raises(errors.PluginError, match=message):
            prepared("broken")
        assert prepared("reference")
    finally:
        sys.modules.pop("broken_module", None)


def test_the_warning_points_at_the_line_that_asked(install):
    install("broken", plugin("broken", qcore_probe=fail))
    with pytest.warns(errors.QcoreWarning) as caught:
        qcore.get_default_qconfig_mapping()
    assert caught[0].filename == __file__
    with pytest.warns(errors.QcoreWarning) as caught:
        qcore.prepare_fx(MODEL, mapping(qcore.default_observer), INPUTS)
    assert caught[0].filename == __file__
