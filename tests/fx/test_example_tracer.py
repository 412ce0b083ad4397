"""Sizes: settled only where something is decided by them, and then guarded."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.fx.graph_module import QGraphModule
from tests.models import Attention, close, prepared_for


@torch.no_grad()
def test_sizes_stay_sizes_and_decisions_are_settled():
    torch.manual_seed(0)
    model = Attention()
    prepared = prepared_for(model, (torch.randn(2, 5, 16),))
    assert isinstance(prepared, QGraphModule)
    for shape in ((2, 5, 16), (7, 9, 16)):  # Another batch, another length.
        prepared(torch.randn(shape))
    converted = qcore.convert_fx(prepared)
    x = torch.randn(3, 8, 16)
    close(converted(x), model(x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert torch.equal(again(x), converted(x))


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * 2 if x.shape[0] > 3 else self.linear(x)


def test_what_is_decided_by_a_size_is_guarded():
    prepared = prepared_for(Grows(), (torch.randn(2, 4),))
    prepared(torch.randn(3, 4))
    with pytest.raises(errors.GuardError, match=r"traced for gt\(x.size\(0\), 3\) = False, and now it is True"):
        prepared(torch.randn(8, 4))
    with pytest.raises(errors.GuardError, match=r"x.dim\(\) = 2, and now it is 3"):
        prepared(torch.randn(2, 2, 4))
    with torch.no_grad():
        converted = qcore.convert_fx(prepared)
    with pytest.raises(errors.GuardError):
        converted(torch.randn(8, 4))


def apply(function, *arguments):
    """Calls everything from one instruction."""
    return function(*arguments)


def one_after_another(calls):
    return [function(*arguments) for function, arguments in calls]


class DecidesInAHelper(nn.Module):
    def __init__(self, decide):
        super().__init__()
        self.layer, self.decide = nn.Linear(4, 4), decide

    def forward(self, x):
        return self.decide(self.layer(x), x.size(0))


def relu_as_often_as_rows(y, rows):
    for _ in apply(range, rows):
        y = apply(torch.relu, y) + 1
    return y


def range_and_reshape(y, rows):
    numbers, flat = one_after_another([(range, (rows,)), (torch.reshape, (y, (rows, -1)))])
    return flat * len(numbers)


def range_and_two_functions(y, rows):
    numbers, _, flat = one_after_another([(range, (rows,)), (torch.relu, (y,)), (torch.reshape, (y, (rows, -1)))])
    return flat * len(numbers)


@torch.no_grad()
@pytest.mark.parametrize("decide", [relu_as_often_as_rows, range_and_reshape, range_and_two_functions])
def test_a_guard_is_kept_whoever_asks_next_from_the_same_instruction(decide):
    model, x = DecidesInAHelper(decide), torch.randn(2, 4)
    prepared = prepared_for(model, (x,))
    assert torch.equal(prepared(x), model(x))
    with pytest.raises(errors.GuardError, match=r"x.size\(0\) = 2, and now it is 5"):
        prepared(torch.randn(5, 4))


SIZED = {
    "reshape": lambda y, n: torch.reshape(y, (n, -1)),
    "view": lambda y, n: y.view(n, -1),
    "factories": lambda y, n: torch.zeros(n, 4) + torch.full((n, 4), 2.0) + y.new_ones(n, 4) + y,
    "expand": lambda y, n: y[:1].expand(n, 4) + torch.broadcast_to(torch.ones(1, 4), (n, 4)),
    "interpolate": lambda y, n: F.interpolate(y[None, None], size=(n, 4))[0, 0],
    "slices": lambda y, n: y[:n] + torch.narrow(y, 0, 0, n) + torch.split(y, n)[0] + torch.roll(y, n, 0),
    "pad": lambda y, n: F.pad(y, (0, 0, 0, n))[:n],
    "from a helper": lambda y, n: apply(torch.reshape, y, (n, -1)) + apply(torch.tile, torch.ones(1, 4), (n, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SIZED)
def test_what_only_hands_a_size_on_settles_nothing(name):
    model = DecidesInAHelper(SIZED[name])
    prepared = prepared_for(model, (torch.randn(2, 4),))
    for batch in (2, 5, 3):
        x = torch.randn(batch, 4)
        assert torch.equal(prepared(x), model(x))


def test_what_is_settled_deep_in_a_model_needs_no_deep_recursion():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(1500):
                x = x + 1
            return self.linear(x) if x.shape[0] < 9 else x

    prepared = prepared_for(Deep(), (torch.randn(2, 4),))
    assert isinstance(prepared, QGraphModule)
    with pytest.raises(errors.GuardError, match=r"size\(0\)"):
        prepared(torch.randn(9, 4))
