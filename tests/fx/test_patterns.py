"""Patterns that no graph can hold are found before they match nothing."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.fx import operators as op
from qcore.fx.fuse import FusionPattern
from qcore.fx.patterns import config_problems, pattern_problems
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
