"""What a traced forward sees: values that answer by the example inputs, and write what they record."""

import copy
import operator

import pytest
import torch
from torch import nn

from qcore.errors import GuardError, TraceError
from qcore.fx.signature import CallSignature, check_size
from qcore.fx.tracer import trace
from qcore.fx.values import INPLACE_OPERATORS, values_in


class Runs(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def traced(body, x):
    model = Runs(body).eval()
    return trace(model, signature=CallSignature.of(model, (x,), {}, "Runs"), examples=(x,))


X = torch.arange(6.0).reshape(2, 3)


def targets(module):
    return [node.target for node in module.graph.nodes if node.op in ("call_function", "call_method")]


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda x: x.dtype, torch.float32),
        (lambda x: x.is_floating_point(), True),
        (lambda x: x.ndim, 2),
        (lambda x: x.dim(), 2),
        (lambda x: len(x), 2),
        (lambda x: len(x.shape), 2),
        (lambda x: int(x.shape[-1]), 3),
        (lambda x: float(x.size(0)), 2.0),
        (lambda x: round(x.size(1) / 2), 2),
        (lambda x: x.size(0) == 2 or False, True),
        (lambda x: list(range(10))[x.size(0)], 2),
        (lambda x: x.shape.numel() > 5, True),
    ],
)
def test_what_does_not_depend_on_data_is_answered_by_the_example(ask, answer):
    found = []

    def body(x):
        found.append(bool(ask(x)) if isinstance(answer, bool) else ask(x))
        return x + 1

    traced(body, X)
    assert found == [answer]


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: len(x), lambda x: int(x.size(0)), lambda x: list(x), lambda x: [0, 1, 2][x.size(0)],
        lambda x: x.shape[0] < 3,
    ],
)  # fmt: skip
def test_what_was_decided_by_a_size_is_compared_at_every_call(decide):
    module = traced(lambda x: x + 1 if decide(x) else x, X)
    assert check_size in targets(module)
    assert torch.equal(module(X), X + 1)
    with pytest.raises(GuardError, match="was traced for"):
        module(torch.cat([X, X]))


@pytest.mark.parametrize("decide", [bool, float, lambda x: x > 0 and x, lambda x: range(x.long())])
def test_what_depends_on_data_decides_nothing(decide):
    with pytest.raises(TraceError, match="decides by the data"):
        traced(lambda x: x + 1 if decide(x.sum()) else x, X)


def test_data_cannot_be_assigned():
    def body(x):
        y = x + 1
        y.data = x
        return y

    with pytest.raises(TraceError, match="it assigns to .data of a tensor"):
        traced(body, X)


@pytest.mark.parametrize("method", ["__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"])
def test_an_in_place_operator_is_seen_by_all_who_hold_the_tensor_and_by_none_who_hold_a_number(method):
    overwriting = INPLACE_OPERATORS[method][0]

    def body(x):
        y = held = x + 1
        y = overwriting(y, 2)
        size = before = x.size(0)
        size = overwriting(size, 3)
        return held, y, size * torch.ones(1), before * torch.ones(1)

    expected = body(X.clone())
    for found, wanted in zip(traced(body, X)(X.clone()), expected, strict=True):
        assert torch.equal(found, wanted)


def test_every_in_place_operator_has_its_plain_form():
    for method, (overwriting, plain) in INPLACE_OPERATORS.items():
        assert overwriting.__name__ == method.strip("_") and plain.__name__.strip("_") == method.strip("_")[1:]
        assert overwriting is getattr(operator, method) and plain is not overwriting


def test_a_deep_copy_is_a_new_tensor_and_a_shallow_one_the_same():
    def body(x):
        y = x + 1
        deep, shallow = copy.deepcopy([y, y]), copy.copy(y)
        y.mul_(2)
        return deep[0], deep[1], shallow

    expected = body(X)
    for found, wanted in zip(traced(body, X)(X), expected, strict=True):
        assert torch.equal(found, wanted)


def test_values_are_found_in_all_that_an_argument_may_be():
    found = []

    def body(x):
        y = x + 1
        nested = {"a": [y, (slice(x.size(0), None, y),)], "b": None, "c": "text"}
        found.append([value is y for value in values_in(nested)])
        return y

    traced(body, X)
    assert sorted(found[0]) == [False, True, True]
    assert values_in([1, "a", X, {"b": (None,)}]) == []
