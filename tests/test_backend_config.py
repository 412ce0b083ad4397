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
