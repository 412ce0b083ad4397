"""The way of a part through the passes."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qcore
from qcore.fx.parts import PythonCall
from qcore.fx.plan import Refusal
from qcore.fx.prepare import Preparer, garbage_left_alone
from qcore.fx.resolve import Resolver
from qcore.fx.tracer import Origin
from qcore.fx.twin import Copies
from qcore.quantization_plan import Decision, PythonModule, QuantizationPlan


def test_the_garbage_collector_is_on_again_when_the_last_one_is_done():
    first, second = garbage_left_alone(), garbage_left_alone()
    assert gc.isenabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_garbage_collector_that_was_off_stays_off_and_an_error_changes_nothing():
    gc.disable()
    try:
        with garbage_left_alone():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(KeyError), garbage_left_alone():
        raise KeyError
    assert gc.isenabled()


def preparer(*decisions):
    settings = SimpleNamespace(backend="b", backend_config=qcore.BackendConfig())
    made = Preparer(None, {}, settings, (), {}, Copies())
    made.plans = {"": QuantizationPlan("b", decisions)}
    return made


def decision(rule, quantized):
    return Decision(rule, (rule,), ("linear",), rule, quantized, rule)


def test_a_refusal_counts_if_it_names_the_operator_or_if_its_rule_quantizes_nothing():
    made = preparer(decision("kept", True), decision("dropped", False))
    refusals = {
        name: Refusal(decision(rule, False), is_specific)
        for name, rule, is_specific in (
            ("by name", "kept", True), ("of a container that has others", "kept", False),
            ("of a container without any", "dropped", False), ("of all", "global", False),
        )
    }  # fmt: skip
    made.refusals = list(refusals.values())
    assert made.broken_requests() == [refusals["by name"], refusals["of a container without any"]]


def test_something_is_quantized_if_it_is_in_any_part():
    made = preparer(decision("a", False))
    assert not made.quantizes_anything
    made.plans["part"] = QuantizationPlan("b", (decision("b", True),))
    assert made.quantizes_anything
    assert made.idle(SimpleNamespace(python=("the model",))) == {"": made.plans[""]}
    assert made.idle(SimpleNamespace(python=())) == {}  # A whole graph is prepared, whatever is in it.


def test_what_is_kept_whole_and_what_the_user_reads_of_it_is_one_copy():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return x * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.counts = nn.Linear(4, 4), Counts()
            self.counter = self.counts

        def forward(self, x):
            return self.counts(self.linear(x))

    model = Net().eval()
    custom = qcore.PrepareCustomConfig().set_preserved_attributes(["counter"])
    custom.set_non_traceable_module_classes([Counts])
    x = torch.randn(2, 4)
    prepared = qcore.prepare_fx(
        model, qcore.get_default_qconfig_mapping("reference"), (x,), custom, backend="reference"
    )
    prepared(x)
    assert (model.counter.calls, prepared.counter.calls) == (0, 1)


def test_what_stays_python_is_decided_upon_each_for_its_reason():
    mapping = qcore.QConfigMapping().set_global(qcore.default_qconfig).set_module_name("asked", None)
    made = preparer()
    made.resolver = Resolver(mapping)
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.block = nn.Sequential()

    def call(kind, path, reason, weights):
        return PythonCall(Origin(kind, True, path, path.rpartition(".")[0], None, 0), True, reason, weights)

    found = SimpleNamespace(
        python=(PythonModule("inner.block", "Sequential", "it decides by data"), PythonModule("called", "LSTM", "why")),
        python_calls=(
            call(nn.Linear, "asked", "", 8), call(nn.LSTM, "called", "", 9),
            call(nn.Linear, "inner.c", "several forms", 4), call(nn.Linear, "d", "", 0),
        ),
        other_weights=3,
    )  # fmt: skip
    plan = made.plan_around(model, found)
    assert [(d.path, d.node, d.operators, d.weights) for d in plan.decisions] == [
        ("asked", "asked", ("Linear",), 8), ("called", "called", ("LSTM",), 9), ("inner.c", "inner_c", ("Linear",), 4),
        ("d", "d", ("Linear",), 0),
    ]  # fmt: skip
    assert [d.reason for d in plan.decisions] == [
        "rule module_name 'asked' says float", "b has no pattern for it", "it stays Python: several forms",
        "it stays Python: it is called by what stays Python",
    ]  # fmt: skip
    assert plan.quantized == () and (plan.python, plan.other_weights) == (found.python, 3)
    # What was asked for is refused; a module that is called has its refusal by its call.
    assert [(r.decision.path, r.is_specific) for r in made.refusals] == [
        ("called", False), ("inner.c", False), ("d", False), ("inner.block", False),
    ]  # fmt: skip
    named = Resolver(qcore.QConfigMapping().set_module_name("d", qcore.default_qconfig))
    made.resolver, made.refusals = named, []
    made.decide_python(model, found)
    assert [(r.decision.path, r.is_specific) for r in made.refusals] == [("d", True)]
