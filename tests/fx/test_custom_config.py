"""Exceptions to the rules: lists are lists, and what isn't here is refused."""

import pytest
from torch import nn

import qcore
from qcore import errors
from tests.small import calibrated, prepare


@pytest.mark.parametrize(
    ("setter", "value"),
    [
        ("set_non_traceable_module_names", "0.1"), ("set_non_traceable_module_names", [nn.Linear]),
        ("set_non_traceable_module_classes", nn.Linear), ("set_non_traceable_module_classes", ["Linear"]),
        ("set_preserved_attributes", "name"), ("set_preserved_attributes", 3),
    ],
)  # fmt: skip
def test_a_custom_config_takes_lists(setter, value):
    with pytest.raises(errors.ConfigError, match=f"{setter}: expected a list of "):
        getattr(qcore.PrepareCustomConfig(), setter)(value)
    if setter == "set_preserved_attributes":
        with pytest.raises(errors.ConfigError, match="expected a list of names"):
            qcore.convert_fx(calibrated(), {"preserved_attributes": value})


def test_custom_config_names_that_match_nothing():
    custom = qcore.PrepareCustomConfig().set_non_traceable_module_names(["nope"]).set_preserved_attributes(["gone"])
    with pytest.raises(errors.ConfigError, match="nope") as caught:
        prepare(prepare_custom_config=custom)
    assert len(caught.value.problems) == 2


def test_the_dictionary_form_says_the_same_as_the_setters():
    made = qcore.PrepareCustomConfig.from_dict(
        {
            "non_traceable_module_name": ["a.b"], "non_traceable_module_class": (nn.LSTM,),
            "preserved_attributes": (name for name in ("classes",)), "input_quantized_idxs": [],
        }
    )  # fmt: skip
    wanted = qcore.PrepareCustomConfig().set_non_traceable_module_names(["a.b"])
    wanted.set_non_traceable_module_classes([nn.LSTM]).set_preserved_attributes(["classes"])
    assert vars(made) == vars(wanted) and made.preserved_attributes == ["classes"]
    assert qcore.ConvertCustomConfig.from_dict({"preserved_attributes": ["a"]}).preserved_attributes == ["a"]


@pytest.mark.parametrize(
    "key",
    [
        "standalone_module_name", "standalone_module_class", "float_to_observed_custom_module_class",
        "input_quantized_idxs", "output_quantized_idxs",
    ],
)  # fmt: skip
def test_a_key_that_asks_for_what_isn_t_here_is_no_unknown_one(key):
    with pytest.raises(errors.NotSupportedError):
        qcore.PrepareCustomConfig.from_dict({key: [0]})


def test_unknown_keys_are_named_with_the_known_ones():
    with pytest.raises(errors.ConfigError, match=r"\['non_traceable_modules'\].*non_traceable_module_name"):
        qcore.PrepareCustomConfig.from_dict({"non_traceable_modules": [], "preserved_attributes": []})
    with pytest.raises(errors.ConfigError, match="unknown keys"):
        qcore.ConvertCustomConfig.from_dict({"non_traceable_module_name": ["a"]})


def test_a_failure_of_a_guard_is_an_error_or_goes_to_a_float_model():
    custom = qcore.PrepareCustomConfig()
    assert custom.guard_failure == "error" and custom.set_guard_failure("float").guard_failure == "float"
    with pytest.raises(errors.ConfigError, match='"error" or "float", found True'):
        custom.set_guard_failure(True)
    assert custom.guard_failure == "float"


def test_two_configs_share_no_list():
    first, second = qcore.PrepareCustomConfig(), qcore.PrepareCustomConfig()
    names = ["a"]
    first.set_non_traceable_module_names(names)
    names.append("b")
    assert first.non_traceable_module_names == ["a"] and second.non_traceable_module_names == []
