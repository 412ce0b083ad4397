"""The arguments of the verbs: all that is wrong with a call comes at once."""

import pytest
import torch
from torch import nn

import qcore
from qcore import MinMaxObserver, QConfig, QConfigMapping, errors
from tests.small import INPUTS, INT8, calibrated, model, prepare


def test_names_that_match_nothing_are_all_listed_with_what_was_meant():
    mapping = QConfigMapping().set_module_name("O", INT8).set_module_name("layer1", None)
    mapping.set_module_name_regex("conv.*", INT8).set_module_name_object_type_order("", nn.Linear, 7, INT8)
    named = nn.ModuleDict({"layer10": nn.Linear(4, 4)}).eval()
    named.forward = lambda x: named["layer10"](x)
    with pytest.raises(errors.ConfigError) as caught:
        qcore.prepare_fx(named, mapping, INPUTS, backend="reference")
    assert len(caught.value.problems) == 3
    assert "set_module_name('layer1') matches no module; did you mean 'layer10'?" in str(caught.value)
    assert "set_module_name_regex('conv.*') matches no module" in str(caught.value)


def test_a_model_in_training_mode_names_what_is_training():
    module = model()
    module[2].train()
    with pytest.raises(errors.TrainingModeError, match=r"in training mode are: 2\. Call model.eval"):
        prepare(module)


def test_wrong_types_are_all_listed():
    with pytest.raises(errors.ConfigError) as caught:
        qcore.prepare_fx("model", QConfigMapping(), 3, backend="reference", on_unsupported="maybe")
    assert len(caught.value.problems) == 3
    with pytest.raises(errors.ConfigError, match="expected a qcore.QConfigMapping, found list"):
        prepare(mapping=[])
    with pytest.raises(errors.ConfigError, match="expected a qcore.QConfig or None"):
        QConfigMapping().set_global(MinMaxObserver)
    with pytest.raises(errors.ConfigError, match="backend_config: expected a qcore.BackendConfig, found dict"):
        prepare(backend_config={})


def test_all_problems_of_a_request_come_at_once():
    mapping = {
        "": MinMaxObserver, "object_type": [("Linear", INT8), (nn.ReLU(), INT8), (nn.Linear, INT8, 3)],
        "module_name_regex": [("(", INT8)], "module_name": [(3, INT8)],
        "module_name_object_type_order": [("", nn.Linear, -1, INT8)], "module": [],
    }  # fmt: skip
    custom = qcore.PrepareCustomConfig().set_non_traceable_module_names(["nope"]).set_preserved_attributes(["gone"])
    with pytest.raises(errors.ConfigError) as caught:
        qcore.prepare_fx(
            model(), mapping, INPUTS[0], custom, backend_config=3, backend=4, on_unsupported="maybe",
            concrete_args=[1], tracer=torch.fx.Tracer,
        )  # fmt: skip
    expected = [
        "example_inputs: expected a tuple", "backend: expected the name of a backend, found int",
        "backend_config: expected a qcore.BackendConfig, found int", "concrete_args: expected a dictionary",
        "tracer: expected a torch.fx.Tracer, found the class Tracer", "on_unsupported: expected",
        "unknown keys ['module']", "set_global: expected a qcore.QConfig",
        "did you mean torch.nn.Linear?", "found an instance of ReLU; give ReLU itself", "wrong number of entries",
        "'(' is no regular expression", "set_module_name: expected a string, found 3",
        "expected the number of a call, from 0, found -1", "'nope' is no module", "no attribute 'gone'",
    ]  # fmt: skip
    assert len(caught.value.problems) == len(expected), caught.value
    for text, problem in zip(expected, caught.value.problems, strict=True):
        assert text in problem
    assert isinstance(caught.value, ValueError)


def test_problems_of_rules_and_of_observers_come_together():
    wrong = QConfig(MinMaxObserver.with_args(eps=-1), MinMaxObserver)
    mapping = QConfigMapping().set_module_name("9", wrong).set_module_name("", INT8)
    mapping.set_module_name_object_type_order("8", nn.Linear, 0, INT8)
    with pytest.raises(errors.ConfigError) as caught:
        prepare(mapping=mapping)
    assert [problem.split(":")[0].split(" matches")[0] for problem in caught.value.problems] == [
        "module_name '9', activation", "set_module_name('9')",
        "set_module_name('') names the model itself; say set_global",
        "set_module_name_object_type_order('8', Linear, 0)",
    ]  # fmt: skip


def test_wrong_types_given_to_convert_and_fuse():
    for verb in (qcore.convert_fx, qcore.convert_to_reference_fx):
        with pytest.raises(errors.ConfigError, match="convert_custom_config: expected a qcore.ConvertCustomConfig"):
            verb(calibrated(), qcore.PrepareCustomConfig())
        with pytest.raises(errors.ConfigError, match=r"unknown keys \['x'\] in the custom config"):
            verb(calibrated(), {"x": 1})
    with pytest.raises(errors.ConfigError) as caught:
        qcore.fuse_fx("model", backend=3)
    assert len(caught.value.problems) == 2
