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
from qcore.fx.match import PatternTable, find_matches, only_reader
from qcore.fx.tracer import trace
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


class Chain(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def nodes_of(body):
    return {node.name: node for node in trace(Chain(body).eval()).graph.nodes}


def pattern(elements):
    return BackendPatternConfig(elements).add_dtype_config(U8)


def matches(body, *patterns, may_absorb=lambda anchor, clamp: True, accepts=lambda anchor, pattern: True):
    return find_matches(trace(Chain(body).eval()).graph, config(*patterns), {}, may_absorb, accepts)


def matched(body, *patterns, **how):
    """Names of the nodes of each match, and how many clamps are at its end."""
    return [([node.name for node in match.nodes], match.clamps) for match in matches(body, *patterns, **how)]


def test_longer_patterns_are_tried_first_and_equal_ones_in_their_order():
    table = PatternTable([("exp", 1), ((torch.exp, torch.sin), 2), (torch.exp, 3), ((torch.exp, torch.sin, "cos"), 4)])
    nodes = nodes_of(lambda m, x: torch.cos(torch.sin(torch.exp(x))))
    assert [item for _, item in table.chains(nodes["exp"], {})] == [2, 3]
    # A method is no function: only operators of qcore's table are one in all forms.
    assert [[n.name for n in chain] for chain, _ in table.chains(nodes["exp"], {})] == [["exp", "sin"], ["exp"]]
    assert list(table.chains(nodes["sin"], {})) == []


@pytest.mark.parametrize(
    ("body", "reader"),
    [
        (lambda m, x: m.a(x).exp(), "exp"),
        (lambda m, x: m.a(x), None),  # The caller reads it.
        (lambda m, x: (lambda y: (y.exp(), y.sin()))(m.a(x)), None),
        (lambda m, x: (lambda y: (y.exp(), y))(m.a(x)), None),
        (lambda m, x: F.linear(x, m.a(x)), None),  # As a weight.
        (lambda m, x: (lambda y: y + y)(m.a(x)), "add"),  # One node, though twice.
    ],
)
def test_the_only_reader(body, reader):
    found = only_reader(nodes_of(body)["a"])
    assert (None if found is None else found.name) == reader


def test_no_node_is_in_two_chains_and_what_is_read_comes_first():
    def body(m, x):
        y = m.a(x)
        return m.b(y) + y

    assert matched(body, pattern(nn.Linear), pattern(torch.add), pattern((nn.Linear, torch.add))) == [
        (["a"], 0),
        (["b", "add"], 0),
    ]
    assert matched(lambda m, x: x + m.a(x) + m.b(x), pattern(nn.Linear), pattern((nn.Linear, torch.add))) == [
        (["a", "add"], 0), (["b", "add_1"], 0),
    ]  # fmt: skip


def test_clamps_after_a_chain_go_with_it_as_long_as_each_may():
    def body(m, x):
        return F.relu6(F.hardtanh(m.a(x), -3.0, 3.0)).neg()

    assert matched(body, pattern(nn.Linear)) == [(["a", "hardtanh", "relu6"], 2)]
    assert matched(body, pattern(nn.Linear), may_absorb=lambda anchor, clamp: clamp.args[1] < 0) == [
        (["a", "hardtanh"], 1)
    ]
    assert matched(body, pattern(nn.Linear), may_absorb=lambda anchor, clamp: False) == [(["a"], 0)]
    assert matched(body, pattern((nn.Linear, nn.ReLU)), may_absorb=lambda *_: False) == [(["a", "hardtanh"], 1)]
    sharing = pattern(nn.Linear)
    sharing.set_observation_type(qcore.ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT)
    assert matched(body, sharing) == [(["a"], 0)]


def test_of_several_patterns_the_first_that_accepts_is_chosen_and_else_the_first_of_all():
    is_wide = Condition("wide", lambda node: True)
    patterns = pattern((nn.Linear, nn.ReLU)), pattern(nn.Linear), pattern(nn.Linear).set_condition(is_wide)

    def chosen(accepts):
        body = lambda m, x: m.a(x).relu()  # noqa: E731
        (match,) = matches(body, *patterns, may_absorb=lambda *_: False, accepts=accepts)
        return len(match.nodes), match.config.condition is is_wide

    assert chosen(lambda anchor, pattern: True) == (2, False)
    assert chosen(lambda anchor, pattern: False) == (2, False)
    assert chosen(lambda anchor, pattern: pattern.condition is None and pattern.pattern is nn.Linear) == (1, False)
    assert chosen(lambda anchor, pattern: not isinstance(pattern.pattern, tuple)) == (1, True)


def test_what_is_not_observed_is_not_matched():
    passing = pattern(nn.Linear)
    passing.set_observation_type(qcore.ObservationType.INPUT_OUTPUT_NOT_OBSERVED)
    assert matched(lambda m, x: m.a(x), passing) == []


def test_the_inputs_of_a_match_come_from_outside_in_order():
    (match,) = matches(lambda m, x: torch.add(x.exp(), m.a(x.sin())), pattern((nn.Linear, torch.add)))
    assert [node.name for node in match.inputs()] == ["sin", "exp"]
    assert (match.anchor.name, match.result.name) == ("a", "add")
