"""The plan as plain data: what it says in all, and how it prints."""

import torch
from torch import nn

import qcore
from qcore.quantization_plan import Decision, PythonModule, QuantizationPlan, joined_plan
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


def decision(node="a", quantized=True, macs=0, weights=0, **more):
    return Decision(
        node, (node,), ("linear",), f"path.{node}", quantized, "global", multiply_adds=macs, weights=weights, **more
    )


def test_shares_count_what_is_on_integers_of_all_that_there_is():
    plan = QuantizationPlan(
        "b", (decision(macs=30, weights=6), decision("b", False, 10, 2), decision("c")), other_weights=4
    )
    assert (plan.multiply_add_share, plan.weight_share) == (0.75, 0.5)
    assert [d.node for d in plan.quantized] == ["a", "c"] and [d.node for d in plan.floating] == ["b"]
    nothing = QuantizationPlan("b", (decision("b", False),))
    assert (nothing.multiply_add_share, nothing.weight_share) == (1.0, 1.0)
    assert QuantizationPlan("b", (), other_weights=5).weight_share == 0.0


def test_a_module_that_stays_python_says_why_where_and_what_to_do():
    module = PythonModule("a", "Block", "it decides by data", "model.py:7", "a.b")
    assert str(module) == (
        "a (Block) stays Python: it decides by data at model.py:7; to trace around a.b, keep it whole with "
        "PrepareCustomConfig().set_non_traceable_module_names(['a.b'])"
    )
    assert str(PythonModule("", "Net", "why", culprit="")) == "the model (Net) stays Python: why"
    assert str(PythonModule("a", "Net", "why", culprit="a")) == "a (Net) stays Python: why"


def test_plans_are_joined_with_the_graphs_first_and_nothing_is_counted_twice():
    python = PythonModule("", "Net", "why")
    around = QuantizationPlan(
        "b", (decision("outside", False),), notes=("of the host",), python=(python,), other_weights=3
    )
    first = QuantizationPlan("b", (decision("x"),), notes=("NaN",), other_weights=1)
    second = QuantizationPlan("b", (decision("y"),))
    joined = joined_plan({"": around, "p": first, "q": second})
    assert [d.node for d in joined.decisions] == ["x", "y", "outside"]
    assert joined.parts == ("p", "q") and joined.python == (python,) and joined.other_weights == 4
    assert joined.notes == ("p: NaN",)
    assert joined_plan({"": first}) is first
    assert "graphs: p, q" in str(joined) and "the model (Net) stays Python: why" in str(joined)


def test_a_row_says_dtypes_condition_and_kernel():
    config = qcore.DTypeConfig(torch.uint8, torch.float32, torch.int8)
    text = QuantizationPlan(
        "b",
        (
            decision(dtype_config=config, condition="depthwise", kernel="Fast"), decision("b"),
            decision("c", dtype_config=qcore.DTypeConfig(torch.uint8, torch.uint8), reason="no kernel"),
            decision("d", False, reason="asked so"),
        ),
    ).as_text(200)  # fmt: skip
    rows = [line.split("  ") for line in text.splitlines()[-4:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        ["linear [depthwise]", "path.a", "uint8 -> float32, weight int8", "global", "Fast"],
        ["linear", "path.b", "integers", "global", "reference"],
        ["linear", "path.c", "uint8 -> uint8", "global", "no kernel"],
        ["linear", "path.d", "float", "global", "asked so"],
    ]
