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
