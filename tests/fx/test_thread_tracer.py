"""A tracer that other threads don't notice."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qcore
from qcore.fx.signature import CallSignature
from qcore.fx.thread_tracer import ThreadTracer
from qcore.fx.tracer import trace
from tests.models import prepared_for


@torch.fx.wrap
def wrapped(x, weight, bias):
    return F.linear(x * x.shape[0], weight, bias)


class Wraps(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return wrapped(x, self.linear.weight, self.linear.bias)


def test_a_function_that_was_wrapped_for_fx_is_looked_into():
    prepared = prepared_for(Wraps(), (torch.randn(2, 4),))
    assert [d.operators for d in qcore.explain(prepared).quantized] == [("linear",)]
    prepared(torch.randn(5, 4))


class Runs(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def traced(body, x):
    model = Runs(body).eval()
    return trace(model, signature=CallSignature.of(model, (x,), {}, "Runs"), examples=(x,))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + torch.zeros(x.shape[0], 1), lambda m, x: x * torch.arange(x.size(1)),
        lambda m, x: x + torch.full((x.size(0), 1), 2.0), lambda m, x: x * math.sqrt(x.size(0)),
        lambda m, x: x[: math.ceil(x.size(0) / 2)], lambda m, x: x + torch.tensor(x.size(0)),
        lambda m, x: torch.eye(x.size(0)) @ x, lambda m, x: x * torch.as_tensor(x.size(0)),
    ],
)  # fmt: skip
def test_what_is_made_of_sizes_follows_them(body):
    """A factory that computed with the example's size would leave a constant of that size, for every batch."""
    model = traced(body, torch.randn(2, 4))
    for batch in (2, 5):
        x = torch.randn(batch, 4)
        assert torch.equal(model(x), body(None, x))


def test_random_numbers_are_drawn_at_each_call_and_not_once():
    model = traced(lambda m, x: x + torch.rand(4), torch.zeros(1, 4))
    assert not torch.equal(model(torch.zeros(1, 4)), model(torch.zeros(1, 4)))


def test_what_is_computed_without_values_of_the_graph_is_computed_now():
    seen = []

    def body(m, x):
        seen.append((math.sqrt(4), torch.zeros(2), torch.is_tensor(torch.ones(1)), isinstance(3, int)))
        return x + seen[0][1].sum() + math.sqrt(4)

    traced(body, torch.randn(2, 4))
    ((root, zeros, is_tensor, is_int),) = seen
    assert root == 2.0 and type(zeros) is torch.Tensor and is_tensor and is_int


def test_a_value_is_asked_as_what_it_stands_for():
    asked = []

    def body(m, x):
        asked.append((isinstance(x, torch.Tensor), torch.is_tensor(x), isinstance(x, nn.Module)))
        asked.append((isinstance(x.size(0), int), torch.is_floating_point(x), torch.is_complex(x)))
        return x + 1

    traced(body, torch.randn(2, 4))
    assert asked == [(True, True, False), (True, True, False)]


def test_other_threads_compute_meanwhile_and_afterwards_nothing_is_left():
    places = [(nn.Module, "__call__"), (nn.Module, "__getattr__"), (torch, "zeros"), (math, "sqrt"), (torch, "rand")]
    before = [vars(owner)[name] for owner, name in places]
    linear, given, found = nn.Linear(4, 4), torch.randn(2, 4), []
    expected = linear(given)

    def meanwhile():
        found.append(linear(given))
        found.append((torch.zeros(2), math.sqrt(9), isinstance(given, torch.Tensor)))

    def body(m, x):
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join(60)
        return m.linear(x)

    module = ThreadTracer().trace(Runs(body))
    assert isinstance(module, fx.Graph) and [n.op for n in module.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(found[0], expected) and found[1][1:] == (3.0, True) and type(found[1][0]) is torch.Tensor
    assert all(vars(owner)[name] is was for (owner, name), was in zip(places, before, strict=True))
    assert "isinstance" not in globals()


def test_a_trace_that_fails_leaves_nothing_either():
    before = nn.Module.__call__

    def body(m, x):
        raise KeyError("its own")

    with pytest.raises(KeyError):
        ThreadTracer().trace(Runs(body))
    assert nn.Module.__call__ is before and "isinstance" not in globals()
