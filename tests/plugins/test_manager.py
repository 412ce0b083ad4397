"""How plugins are found, loaded and refused."""

import contextlib
import copy
import functools
import importlib
import operator
import pickle
import sys
import threading
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.fx import operators as op
from qcore.fx.fuse import FusionPattern
from qcore.fx.patterns import config_problems, pattern_problems
from qcore.fx.record import record_of
from qcore.lowering import Lowered, LoweringRule, lower_with_rules
from qcore.plugins import entry_points, hookspecs, manager, reference
from qcore.plugins.answers import ANSWERS
from qcore.plugins.backend import Backend
from qcore.plugins.entry_points import InstalledBackend
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.testing import plugged_in


def plugin(name="toy", **changes):
    """A minimal plugin as an object; ``changes`` replace hooks, ``None`` leaves one out."""
    hooks = {
        "qcore_backend_info": lambda: BackendInfo(name, PLUGIN_API),
        "qcore_probe": lambda: Availability(True, isa="any"),
        "qcore_backend_config": lambda: reference.qcore_backend_config(),
        "qcore_default_qconfig_mapping": lambda version: reference.qcore_default_qconfig_mapping(version),
        **changes,
    }
    return SimpleNamespace(**{key: hookimpl(function) for key, function in hooks.items() if function is not None})


@pytest.fixture
def install():
    """Makes objects appear as the plugins of installed backends."""
    with contextlib.ExitStack() as stack:
        yield lambda name, plugin, aliases=(), **where: stack.enter_context(
            plugged_in(name, plugin, aliases, **{"version": "1.2.3", **where})
        )


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Makes distributions of metadata and modules, just as an installer leaves them."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(distribution, backends="", aliases="", module="", code="", metadata=True):
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
        (info / "entry_points.txt").write_text(f"[qcore.backends]\n{backends}\n[qcore.aliases]\n{aliases}\n")
        if module:
            (tmp_path / f"{module}.py").write_text(code)
        entry_points.installed_backends.cache_clear()
        importlib.invalidate_caches()

    yield add
    entry_points.installed_backends.cache_clear()


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


# --- names ---


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


def test_a_distribution_gives_aliases_to_its_own_backends_only_and_none_that_is_a_name(on_disk):
    on_disk("aa-first", "one = nowhere\ntwo = nowhere", "uno = one\ntwo = one\nreference = one\neins = one")
    on_disk("zz-second", "three = nowhere", "quick = one\none = three")
    listed = {found.name: (found.distribution, found.aliases) for found in qcore.installed_backends()}
    assert listed["one"] == ("aa-first", ("eins", "uno"))
    assert listed["two"] == ("aa-first", ())
    assert listed["three"] == ("zz-second", ())
    with pytest.raises(errors.BackendNotFoundError, match="zz-second calls 'one' so, but only the distribution that"):
        qcore.get_backend("quick")


def test_distributions_of_one_backend_are_all_listed_and_damaged_ones_hide_none(on_disk):
    on_disk("aa-toy", "toy = nowhere")
    on_disk("zz-toy", "toy = elsewhere")
    on_disk("damaged", "dented = nowhere", metadata=False)
    found = [(b.name, b.distribution) for b in qcore.installed_backends() if b.name in ("toy", "dented")]
    assert found[1:] == [("toy", "aa-toy"), ("toy", "zz-toy")]
    assert found[0][0] == "dented"


def test_no_distribution_takes_the_name_of_the_core_s_own_backend(on_disk):
    on_disk("aa-evil", "reference = nowhere")
    with pytest.warns(errors.QcoreWarning, match=r"'reference' \(aa-evil 1.2.3\) is left out: that name is the core's"):
        listed = [found.distribution for found in qcore.installed_backends() if found.name == "reference"]
    assert listed == ["qcore-fx"]
    assert qcore.get_backend("reference").availability.ok


def test_a_plugin_may_be_an_object_in_a_module(on_disk):
    code = "from qcore.plugins import reference\nclass Plugin:\n" + "".join(
        f"    {name} = staticmethod(reference.{name})\n" for name in hookspecs.REQUIRED
    )
    on_disk("toy", "toy_object = toy_module:PLUGIN", module="toy_module", code=code + "PLUGIN = Plugin()\n")
    with pytest.raises(errors.PluginError, match="'toy_object' .toy 1.2.3. can't be used: it calls itself 'reference'"):
        qcore.get_backend("toy_object")


# --- sloppy plugins ---


def fail(*_arguments, **_keywords):
    raise KeyError("boom")


def leave(*_arguments, **_keywords):
    sys.exit(3)


def nothing(*_arguments, **_keywords):
    return None


class Clamped(nn.Module):
    """Another model, of the same shape."""

    def forward(self, x):
        return x.clamp(0, 1)


class Twice(nn.Module):
    """The model in other clothes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, scale=1.0):
        return self.model(x) * scale


def edits_graph(model):
    node = next(node for node in model.graph.nodes if node.op == "output")
    with model.graph.inserting_before(node):
        node.args = (model.graph.call_function(torch.neg, node.args),)
    model.recompile()
    return Lowered(model)


def edits_tensor(model):
    next(iter(model.buffers())).mul_(2)
    return Lowered(Twice(model))


def edits_modules(model):
    model.register_buffer("extra", torch.ones(1))
    return Lowered(Twice(model))


def config(*elements, **changes):
    made = qcore.BackendPatternConfig(elements if len(elements) > 1 else elements[0])
    made.add_dtype_config(qcore.DTypeConfig())
    vars(made).update(changes)
    return qcore.BackendConfig("toy").set_backend_pattern_config(made)


def mapping(observer):
    return qcore.QConfigMapping().set_global(qcore.QConfig(observer, qcore.default_weight_observer))


class Other(qcore.MinMaxObserver):
    pass


def fusion(pattern, rewrite=nothing):
    return [FusionPattern(pattern, rewrite)]


def with_rule(pattern, build):
    def boundary(qparams):
        return nn.Identity()

    return lambda model: lower_with_rules(model, [LoweringRule(pattern, build)], enter=boundary, leave=boundary)


SLOPPY = [
    *((hook, lambda **_: {1: 2}, "a dict|the key 1") for hook in ANSWERS),
    *((hook, lambda **_: 3, "returned a int, not a") for hook in ANSWERS),
    *((hook, nothing, "returned None, not a") for hook in ANSWERS),
    *((hook, fail, "failed: KeyError: 'boom'") for hook in ANSWERS),
    *((hook, leave, "failed: SystemExit: 3") for hook in ANSWERS),
    ("qcore_backend_info", lambda: BackendInfo(None, PLUGIN_API), "BackendInfo.name=None., which is no str"),
    ("qcore_backend_info", lambda: BackendInfo("toy", "1"), "BackendInfo.api_version='1'., which is no int"),
    ("qcore_backend_info", lambda: BackendInfo("toy", True), "BackendInfo.api_version=True., which is no int"),
    ("qcore_backend_info", lambda: BackendInfo("toy", PLUGIN_API, 3), "BackendInfo.description=3., which is no str"),
    ("qcore_backend_info", lambda: BackendInfo("toy", PLUGIN_API, "", None), "priority=None., which is no int"),
    ("qcore_probe", lambda: True, "returned a bool, not a"),
    ("qcore_probe", lambda: Availability("yes"), "Availability.ok='yes'., which is no bool"),
    ("qcore_probe", lambda: Availability(False, None), "Availability.reason=None., which is no str"),
    ("qcore_probe", lambda: Availability(True, isa=["avx2"]), "which is no str"),
    ("qcore_backend_config", lambda: qcore.BackendConfig, "returned a type, not a"),
    ("qcore_backend_config", lambda: config("rleu"), "tensors have no method 'rleu'; did you mean 'relu'?"),
    ("qcore_backend_config", lambda: config(nn.Linear, "shape"), "tensors have no method 'shape'"),
    ("qcore_backend_config", lambda: config(int), "the class int is no nn.Module"),
    ("qcore_backend_config", lambda: config(nn.ReLU()), "give its class"),
    ("qcore_backend_config", lambda: config(nn.Linear, (nn.ReLU, nn.ReLU)), "one flat tuple in the order of"),
    ("qcore_backend_config", lambda: config(lambda x: x), "no function that a model can call"),
    ("qcore_backend_config", lambda: config(torch.Tensor.relu), "is a method; give its name as a string"),
    ("qcore_backend_config", lambda: config(torch.Tensor.split), "is a method; give its name as a string"),
    ("qcore_backend_config", lambda: config(()), "a pattern without operators"),
    ("qcore_backend_config", lambda: config(7), "7 is no operator, function"),
    ("qcore_backend_config", lambda: config([nn.Linear, nn.ReLU]), "a chain of operators is a tuple"),
    ("qcore_backend_config", lambda: config(replace(op.LINEAR, name="liner")), "'liner' is an operator that qcore's"),
    ("qcore_backend_config", lambda: config(nn.Linear, condition=bool), "expected a qcore Condition, found a"),
    ("qcore_backend_config", lambda: config(nn.Linear, dtype_configs=[{}]), "expected a qcore DTypeConfig, found a"),
    ("qcore_backend_config", lambda: config(nn.Linear, observation_type=0), "expected a qcore ObservationType"),
    ("qcore_fusion_patterns", lambda: iter([]), "not a sequence of FusionPattern"),
    ("qcore_fusion_patterns", lambda: "linear", "returned a str, not a sequence"),
    ("qcore_fusion_patterns", lambda: [nn.ReLU], "holds a type, not only FusionPattern"),
    ("qcore_fusion_patterns", lambda: fusion((nn.Linear, "rleu")), "did you mean 'relu'?"),
    ("qcore_fusion_patterns", lambda: fusion(nn.Linear, 3), "its rewrite is a int, no function"),
    ("qcore_fusion_patterns", lambda: fusion(nn.Linear, fail), "at node '_0' failed: KeyError: 'boom'"),
    ("qcore_fusion_patterns", lambda: fusion(nn.Linear, nothing), "returned None, neither True nor False"),
    ("qcore_observers", lambda: [qcore.MinMaxObserver], "not a mapping of observer classes"),
    ("qcore_observers", lambda: {"MinMaxObserver": Other}, "the key 'MinMaxObserver', which is no observer class"),
    ("qcore_observers", lambda: {qcore.HistogramObserver: Other}, "for HistogramObserver, which is no subclass"),
    ("qcore_observers", lambda: {qcore.MinMaxObserver: Other()}, "for MinMaxObserver, which is no subclass"),
    ("qcore_default_qconfig_mapping", lambda version: {"": None}, "returned a dict, not a"),
    ("qcore_default_qconfig_mapping", lambda version: mapping(fail), "failed: ConfigError: .*boom"),
    ("qcore_lower", lambda model: Lowered(nn.Identity()), "isn't the one it was given: "),
    ("qcore_lower", lambda model: Lowered(Clamped()), "isn't the one it was given: its results differ"),
    ("qcore_lower", lambda model: Lowered(nn.Linear(4, 3)), r"it gives torch.float32 .2, 3. where the reference gives"),
    ("qcore_lower", lambda model: Lowered(nn.Linear(3, 4)), "doesn't run where the reference does: RuntimeError: mat1"),
    ("qcore_lower", lambda model: Lowered(nn.Bilinear(4, 4, 4)), "doesn't run where the reference does: TypeError"),
    ("qcore_lower", lambda model: Lowered(nn.LSTM(4, 4)), "its result is built otherwise"),
    ("qcore_lower", lambda model: nn.Linear, "returned a type, not a qcore.lowering.lowered.Lowered"),
    ("qcore_lower", edits_graph, "changed the reference model that it was given"),
    ("qcore_lower", edits_tensor, "changed the reference model that it was given"),
    ("qcore_lower", edits_modules, "changed the reference model that it was given"),
    ("qcore_lower", with_rule("rleu", fail), "tensors have no method 'rleu'; did you mean 'relu'?"),
    ("qcore_lower", with_rule(op.LINEAR, fail), "failed: KeyError: 'boom'"),
    ("qcore_lower", with_rule(op.LINEAR, nothing), "is None, neither a module nor Declined"),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "answer", "message"), SLOPPY)
def test_a_hook_that_fails_or_gives_what_it_must_not_is_named(install, hook, answer, message):
    install("toy", plugin(**{hook: answer}))
    kind = errors.LoweringError if hook == "qcore_lower" else errors.PluginError
    with pytest.raises(kind, match=message) as caught:
        own = qcore.get_default_qconfig_mapping("toy").set_object_type(nn.Linear, qcore.default_qconfig)
        model = qcore.prepare_fx(MODEL, own, INPUTS, backend="toy")
        model(*INPUTS)
        qcore.convert_fx(model)
    for part in ("'toy'", "qcore-toy 1.2.3", hook, "QCORE_DISABLE_PLUGINS=toy"):
        assert part in str(caught.value)
    found = caught.value
    assert (found.backend, found.distribution, found.hook) == ("toy", "qcore-toy 1.2.3", hook)
    again = pickle.loads(pickle.dumps(found))
    assert (str(again), again.hook) == (str(found), hook)


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


def test_every_hook_s_answer_is_checked():
    assert set(ANSWERS) == {name for name in vars(hookspecs) if name.startswith("qcore_")}


def test_what_the_core_s_own_config_names_is_known():
    assert config_problems(reference.qcore_backend_config()) == []


def test_a_pattern_may_name_whatever_a_graph_can_hold():
    known = (
        "relu", "add_", "contiguous", "exp", F.relu, torch.relu, torch.add, operator.add, torch.fft.fft, nn.ReLU,
        nn.GroupNorm, nn.Dropout, Other, torch.ops.aten.relu, torch.ops.aten.relu.default, fusion, op.LINEAR,
        copy.deepcopy(op.LINEAR), torch._C._nn.gelu, F.max_pool2d,
    )  # fmt: skip
    assert [pattern_problems(element) for element in known] == [[]] * len(known)


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


# --- the choice of a default ---


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


# --- threads ---


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
