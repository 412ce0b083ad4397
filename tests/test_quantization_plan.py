"""The plan as plain data: what it says in all, and how it prints."""

from torch import nn

import qcore
from tests.fx.planning import conv, prepare


def test_the_plan_prints_a_line_for_every_decision():
    plan = qcore.explain(prepare(nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2), nn.LogSoftmax(1)).eval()))
    text = plan.as_text(100)
    shares = "(100% of multiply-adds, 100% of weights)"
    saving = "it has no weights, and integers wouldn't save a conversion here"
    head = (
        f"reference: 1 of 3 operators on integers {shares}; 1 float: {saving}; 1 float: reference has no pattern for it"
    )
    assert plan.summary() == head
    assert text.splitlines()[:3] == [
        f"reference: 1 of 3 operators on integers {shares}", f"  1 float: {saving} (1)",
        "  1 float: reference has no pattern for it (2)",
    ]  # fmt: skip
    for part in ("conv2d + relu", "avg_pool2d", "LogSoftmax", "global"):
        assert part in text


def test_printing_is_as_wide_as_the_terminal(monkeypatch):
    plan = qcore.explain(prepare(nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(1)).eval(), shape=(2, 4)))
    for columns, width in ((80, 80), (20, 60), (150, 150)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert str(plan) == plan.as_text(width)
