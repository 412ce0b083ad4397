"""Operators whose output lies in the range of their input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import (
    BackendPatternConfig,
    ObservationType,
)
from qcore.fx.operators import CLAMP, INTERPOLATE, MOVE_OPERATORS
from qcore.fx.sharing import sharing_patterns
from qcore.fx.tracer import trace
from tests.fx.planning import U8, config, conv, model, observed, prepare


@pytest.mark.parametrize(
    "move",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.flatten(1),
        lambda x: x.reshape(2, -1),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.chunk(2, 1)[0],
        lambda x: F.pad(x, (1, 1)),
        lambda x: x[:, :2],
    ],
)
def test_what_only_moves_elements_is_not_observed_again(move):
    prepared = prepare(model(lambda m, x: move(m.a(x)), a=conv()))
    assert observed(prepared) == [("x", 0), ("a", 1)]
    assert all(d.quantized for d in qcore.explain(prepared).decisions)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "area", "bicubic"])
def test_only_bicubic_interpolation_leaves_the_range_of_its_input(installed_backend, mode):
    torch.manual_seed(0)
    made = model(lambda m, x: F.interpolate(m.a(x).relu(), scale_factor=3.0, mode=mode), a=conv())
    mapping, x = qcore.get_default_qconfig_mapping(installed_backend), torch.randn(2, 4, 6, 6)
    prepared = qcore.prepare_fx(made, mapping, (x,), on_unsupported="error")
    prepared(x)
    assert len(observed(prepared)) == (3 if mode == "bicubic" else 2)
    expected = made(x)
    assert (qcore.convert_fx(prepared)(x) - expected).norm() < 0.02 * expected.norm()


def test_an_observation_type_that_shares():
    made = config(
        BackendPatternConfig(nn.Conv2d).add_dtype_config(U8),
        BackendPatternConfig(torch.sin).set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT).add_dtype_config(U8),
    )  # fmt: skip
    plan = qcore.explain(prepare(model(lambda m, x: torch.sin(m.a(x)), a=conv()), config=made))
    assert plan.shared == {"sin": 1}


def test_the_table_has_each_such_operator_once_with_the_given_dtypes():
    patterns = sharing_patterns(U8)
    assert [p.pattern for p in patterns] == [*MOVE_OPERATORS, CLAMP, INTERPOLATE]
    assert len({p.pattern for p in patterns}) == len(patterns)
    for pattern in patterns:
        assert pattern.observation_type is ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
        assert pattern.dtype_configs == [U8] and (pattern.condition is None) == (pattern.pattern is not INTERPOLATE)


@pytest.mark.parametrize(
    ("mode", "shares"),
    [("nearest", True), ("bilinear", True), ("area", True), ("nearest-exact", True), ("bicubic", False)],
)
def test_what_interpolation_gives_lies_in_the_range_of_what_it_reads_unless_it_is_bicubic(mode, shares):
    form = lambda m, x: F.interpolate(x, scale_factor=2.5, mode=mode)  # noqa: E731
    (node,) = (n for n in trace(model(form)).graph.nodes if n.target is F.interpolate)
    assert sharing_patterns(U8)[-1].condition.holds(node) is shares
    x = torch.zeros(1, 1, 8, 8)
    x[:, :, ::2] = 1.0
    lies_within = bool((form(None, x) >= 0).all() and (form(None, x) <= 1).all())
    assert lies_within or not shares
