"""What hooks may answer, and that a fault is named with plugin, distribution and hook."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import qcore
from qcore import errors
from qcore.fx import operators as op
from qcore.fx.fuse import FusionPattern
from qcore.lowering import Lowered, LoweringRule, lower_with_rules
from qcore.plugins import hookspecs
from qcore.plugins.answers import ANSWERS
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo
from tests.plugins.toys import INPUTS, MODEL, config, fail, leave, mapping, nothing, plugin


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


def test_every_hook_s_answer_is_checked():
    assert set(ANSWERS) == {name for name in vars(hookspecs) if name.startswith("qcore_")}
