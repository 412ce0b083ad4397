"""Patterns in a graph: which fit, which goes first, and what is no chain."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import (
    BackendPatternConfig,
    Condition,
    DTypeConfig,
    DTypeWithConstraints,
)
from tests.fx.planning import U8, config, conv, model, prepare


def test_a_pattern_with_a_condition_goes_before_one_without():
    is_depthwise = Condition("depthwise", lambda node: node.args[6] > 1)
    narrow = DTypeConfig(DTypeWithConstraints(torch.uint8, quant_max_upper_bound=127), torch.uint8, torch.int8)
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8),
        BackendPatternConfig(F.conv2d).set_condition(is_depthwise).add_dtype_config(narrow),
    )
    prepared = prepare(nn.Sequential(conv(), conv(groups=4)).eval(), config=made)
    plan = qcore.explain(prepared)
    assert [d.condition for d in plan.decisions] == ["", "depthwise"]
    assert [t.quant_max for t in plan.qparams] == [255, 127, 255]


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.a(x) + x, lambda m, x: x + m.a(x), lambda m, x: F.relu(torch.add(x, m.a(x)))]
)
def test_a_chain_is_one_operator_in_either_order(forward):
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8),
        BackendPatternConfig((nn.Conv2d, torch.add)).add_dtype_config(U8),
    )
    plan = qcore.explain(prepare(model(forward, a=conv()), config=made))
    (decision,) = plan.decisions
    assert decision.operators[:2] == ("conv2d", "add")
    assert len(plan.observations) == 2


@pytest.mark.parametrize(
    "forward", [lambda m, x: (lambda y: y + y)(m.a(x)), lambda m, x: m.a(x) + 1.0, lambda m, x: (m.a(x) + x, m.a(x))]
)
def test_what_is_no_residual_is_no_chain(forward):
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8), BackendPatternConfig(torch.add).add_dtype_config(U8),
        BackendPatternConfig((nn.Conv2d, torch.add)).add_dtype_config(U8),
    )  # fmt: skip
    plan = qcore.explain(prepare(model(forward, a=conv()), config=made))
    chains = [d.operators for d in plan.decisions]
    assert ("conv2d",) in chains
