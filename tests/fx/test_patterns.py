"""Patterns that no graph can hold are found before they match nothing."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.fx import operators as op
from qcore.fx.fuse import FusionPattern
from qcore.fx.patterns import config_problems, module_classes, pattern_problems
from qcore.plugins import reference
from tests.plugins.toys import nothing


class Other(qcore.MinMaxObserver):
    pass


def fusion(pattern, rewrite=nothing):
    return [FusionPattern(pattern, rewrite)]


def test_what_the_core_s_own_config_names_is_known():
    assert config_problems(reference.qcore_backend_config()) == []


def test_a_pattern_may_name_whatever_a_graph_can_hold():
    known = (
        "relu", "add_", "contiguous", "exp", F.relu, torch.relu, torch.add, operator.add, torch.fft.fft, nn.ReLU,
        nn.GroupNorm, nn.Dropout, Other, torch.ops.aten.relu, torch.ops.aten.relu.default, fusion, op.LINEAR,
        copy.deepcopy(op.LINEAR), torch._C._nn.gelu, F.max_pool2d,
    )  # fmt: skip
    assert [pattern_problems(element) for element in known] == [[]] * len(known)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("rleu", "tensors have no method 'rleu'; did you mean 'relu'"), ("shape", "no method 'shape'"),
        ((), "a pattern without operators"), ((nn.Linear, (nn.ReLU,)), "a chain is one flat tuple"),
        (int, "the class int is no nn.Module"), (nn.ReLU(), "give its class"), (torch.Tensor.add, "is a method"),
        (lambda x: x, "no function that a model can call"), (3, "3 is no operator"), (None, "None is no operator"),
        ([nn.Linear], "within a chain"),
    ],
)  # fmt: skip
def test_what_no_graph_can_hold_is_a_problem(pattern, message):
    (problem,) = pattern_problems(pattern)
    assert message in problem


def test_each_element_of_a_chain_is_looked_at():
    assert len(pattern_problems((nn.Linear, "rleu", 3))) == 2


def made(pattern, **parts):
    config = qcore.BackendPatternConfig(pattern).add_dtype_config(qcore.DTypeConfig())
    vars(config).update(parts)
    return qcore.BackendConfig("chip").set_backend_pattern_config(config)


def test_a_config_s_problems_name_config_and_pattern():
    (problem,) = config_problems(made("rleu"))
    assert problem.startswith("BackendConfig 'chip', pattern 'rleu': tensors have no method")
    found = config_problems(made(nn.Linear, condition=bool, observation_type=0, dtype_configs=["uint8"]))
    assert [p.rpartition("expected a qcore ")[2].split(",")[0] for p in found] == [
        "ObservationType", "DTypeConfig", "Condition",
    ]  # fmt: skip
    assert config_problems(made(nn.Linear)) == []


def test_only_modules_that_are_no_operators_are_kept_whole():
    class Custom(nn.Module):
        pass

    config = made((Custom, nn.ReLU))
    for pattern in (nn.LSTM, nn.Linear, "relu", torch.exp, op.CLAMP):
        config.set_backend_pattern_config(qcore.BackendPatternConfig(pattern).add_dtype_config(qcore.DTypeConfig()))
    assert module_classes(config) == [Custom, nn.LSTM]
