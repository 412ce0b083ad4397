"""What code may do besides computing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.errors import TraceError
from qcore.fx.effects import has_hooks, keeps_no_state
from qcore.fx.tracer import HARMLESS, trace
from tests.models import prepared_for


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.last = [x * 2]
        self.calls += 1
        return self.linear(x)


def test_a_forward_that_keeps_values_for_later_is_no_graph():
    model = Remembers()
    prepared = prepared_for(model, (torch.randn(2, 4),))
    (python,) = qcore.explain(prepared).python
    assert python.reason == "it keeps a value of this call in Remembers.calls for later calls"
    assert model.calls == prepared.calls == 0 and not hasattr(model, "last") and not hasattr(prepared, "last")
    prepared(torch.ones(2, 4))
    assert torch.equal(prepared.last[0], torch.full((2, 4), 2.0))


class Runs(nn.Module):
    def __init__(self, body, **modules):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        for name, module in modules.items():
            self.add_module(name, module)
        self.count, self.note = 0, None
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def harmless(body, **modules):
    return trace(Runs(body, **modules).eval()).meta[HARMLESS]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.linear(x).relu(), lambda m, x: F.gelu(m.linear(x)) + x,
        lambda m, x: F.dropout(x, 0.5, m.training), lambda m, x: m.linear(x).add_(1),
        lambda m, x: torch.cat([x, x * math.pi]),        lambda m, x: m.linear(x) + m.linear.weight.sum(),
    ],
)  # fmt: skip
def test_what_only_computes_is_harmless(body):
    assert harmless(body)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + torch.rand(4), lambda m, x: x + torch.rand_like(x), lambda m, x: F.dropout(x, 0.5, True),
        lambda m, x: torch.bernoulli(x), lambda m, x: F.rrelu(x, training=True), lambda m, x: foreign(x),
        lambda m, x: F.gumbel_softmax(x),
    ],
)  # fmt: skip
def test_what_may_draw_or_do_anything_is_not(body):
    assert not harmless(body)


@torch.fx.wrap
def foreign(x):
    return x + 1


@pytest.mark.parametrize(
    ("module", "keeps_none"),
    [
        (nn.LSTM(4, 4), True), (nn.LayerNorm(4), True), (nn.Embedding(4, 4), True),
        (nn.Embedding(4, 4, max_norm=1.0), False), (Remembers(), False),
    ],
)  # fmt: skip
def test_only_modules_of_torch_s_own_are_known_to_keep_no_state(module, keeps_none):
    assert keeps_no_state(module) is keeps_none
    module.register_forward_hook(lambda *_: None)
    assert not keeps_no_state(module) and has_hooks(module)


def test_a_module_that_draws_is_not_harmless_though_it_keeps_nothing():
    assert not harmless(lambda m, x: m.act(x), act=nn.RReLU())
    assert harmless(lambda m, x: m.act(x), act=nn.Softsign())


def sets(name, value):
    def body(m, x):
        setattr(m, name, value(x) if callable(value) else value)
        return m.linear(x)

    return body


@pytest.mark.parametrize(
    ("name", "value"), [("count", 1), ("count", True), ("note", lambda x: {"seen": [x]}), ("late", lambda x: (x, 1))]
)
def test_what_is_kept_of_a_call_is_state(name, value):
    with pytest.raises(TraceError, match=f"it keeps a value of this call in Runs.{name} for later calls"):
        harmless(sets(name, value))


@pytest.mark.parametrize(
    ("name", "value"), [("count", 0), ("note", "text"), ("note", torch.float16), ("late", lambda x: torch.Size([1]))]
)
def test_a_note_of_what_was_found_is_none(name, value):
    assert harmless(sets(name, value))
