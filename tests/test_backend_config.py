"""BackendConfig: constraints that can be met, patterns that say something."""

import pytest
import torch
from torch import nn

import qcore
from qcore import errors


def test_a_pattern_config_without_pattern_or_dtypes():
    with pytest.raises(errors.ConfigError, match="without a pattern"):
        qcore.BackendConfig("b").set_backend_pattern_config(qcore.BackendPatternConfig())
    with pytest.raises(errors.ConfigError, match="accepts no dtypes"):
        qcore.BackendConfig("b").set_backend_pattern_config(qcore.BackendPatternConfig(nn.Linear))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_min_lower_bound": 10, "quant_max_upper_bound": 5}, r"the range 10\.\.5 must hold two integers"),
        ({"quant_min_lower_bound": 5, "quant_max_upper_bound": 5}, r"the range 5\.\.5 must hold two integers"),
        ({"quant_max_upper_bound": 256}, r"the range 0\.\.256 .* fit uint8"),
        ({"quant_min_lower_bound": -1}, r"the range -1\.\.255 .* fit uint8"),
        ({"quant_min_lower_bound": 0.5}, "quant_min_lower_bound must be a whole number"),
        ({"quant_max_upper_bound": float("nan")}, "quant_max_upper_bound must be a whole number"),
        ({"zero_point_exact_match": 300}, r"zero_point_exact_match 300 lies outside the range 0\.\.255"),
        ({"zero_point_exact_match": 100, "quant_max_upper_bound": 9}, r"lies outside the range 0\.\.9"),
        ({"zero_point_exact_match": 0.5}, "zero_point_exact_match must be a whole number"),
        ({"ch_axis": "0"}, "ch_axis must be a whole number"),
        ({"scale_min_lower_bound": 2, "scale_max_upper_bound": 1}, "scale_min_lower_bound 2 lies above"),
        ({"scale_exact_match": 2, "scale_max_upper_bound": 1}, r"scale_exact_match 2 lies outside 0\.0\.\.1"),
    ],
)
def test_constraints_that_nothing_can_meet(arguments, message):
    with pytest.raises(errors.ConfigError, match=message):
        qcore.DTypeWithConstraints(torch.uint8, **arguments)


def test_all_that_is_wrong_with_constraints_comes_at_once():
    with pytest.raises(errors.ConfigError) as caught:
        qcore.DTypeWithConstraints(torch.quint8, 9, 3, 5.0, 4.0, zero_point_exact_match=20)
    assert len(caught.value.problems) == 3
    qcore.DTypeWithConstraints(torch.float32, 0.0, 255.0, 2**-12)  # As torch.ao's own configs have them.


def pattern(elements=nn.Linear, condition=None):
    made = qcore.BackendPatternConfig(elements).add_dtype_config(qcore.DTypeConfig(torch.uint8))
    return made.set_condition(condition) if condition else made


def test_a_pattern_replaces_one_of_the_same_pattern_and_condition_only():
    wide = qcore.Condition("wide", lambda node: True)
    first, second, third = pattern(), pattern(condition=wide), pattern((nn.Linear, nn.ReLU))
    config = qcore.BackendConfig("b").set_backend_pattern_configs([first, second, third])
    assert config.configs == [first, second, third]
    again = pattern(condition=qcore.Condition("wide", lambda node: False))
    config.set_backend_pattern_config(again)
    assert [c is again for c in config.configs] == [False, True, False]


def test_a_copy_changes_nothing_of_its_original():
    config = qcore.BackendConfig("b").set_backend_pattern_config(pattern())
    copied = config.copy()
    copied.configs[0].add_dtype_config(qcore.DTypeConfig())
    copied.set_name("c").set_backend_pattern_config(pattern("relu"))
    assert (config.name, len(config.configs), len(config.configs[0].dtype_configs)) == ("b", 1, 1)


def test_a_dtype_is_one_without_further_constraints():
    constrained = qcore.DTypeWithConstraints(torch.quint8, quant_max_upper_bound=127)
    config = qcore.DTypeConfig(torch.quint8, constrained)
    assert config.input_constraints == qcore.DTypeWithConstraints(torch.uint8)
    assert config.output_constraints is constrained and constrained.integers == (0, 127)
    assert config.weight_constraints == qcore.DTypeWithConstraints() and config.weight_dtype is None
    schemes = qcore.DTypeWithConstraints(torch.int8, qschemes=(torch.per_tensor_symmetric,)).qschemes
    assert schemes == (qcore.QScheme.per_tensor_symmetric,)


def test_a_condition_that_fails_names_itself_and_the_node():
    node = torch.fx.Graph().call_function(torch.relu, ())
    assert qcore.Condition("any", lambda node: 1).holds(node) is True
    with pytest.raises(
        errors.PluginError, match=r"condition 'deep' .* node 'relu' \(a relu\): KeyError: 'depth'"
    ) as caught:
        qcore.Condition("deep", lambda node: node.meta["depth"]).holds(node)
    assert caught.value.hook == "qcore_backend_config" and isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("config", ["relu", None, pattern().copy().set_pattern([nn.Linear])])
def test_what_is_no_pattern_config_is_refused(config):
    with pytest.raises(errors.ConfigError, match="^BackendConfig 'b': "):
        qcore.BackendConfig("b").set_backend_pattern_config(config)
