"""The guard: writes into what is protected are refused, and random numbers drawn from a stream of the guard's."""

import pytest
import torch
from torch import nn

import qcore
from qcore.fx.guard import RealCalls, WriteError, aside, draws, guarded, memory_of
from qcore.fx.values import UndecidableError
from tests.models import prepared_for


class Shrinks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        for parameter in self.parameters():
            parameter.data.mul_(0.5)
        return self.linear(x)


@torch.no_grad()
def test_weights_that_change_at_each_call_are_no_weights_to_quantize():
    model = Shrinks()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(
        qcore.errors.UnsupportedQConfigWarning, match="writes into a tensor that is kept for later calls"
    ):
        prepared_for(model, (torch.randn(3, 4),))
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.view(-1)[1:].zero_(),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch._foreach_add_([torch.ones(2), w], 1.0),
        lambda w: w.data.copy_(torch.zeros(2, 2)),
        lambda w: w.t().index_fill_(0, torch.tensor([0]), 0.0),
        lambda w: nn.init.zeros_(w),
    ],
    ids=["method", "view", "out", "list", "data", "transposed", "init"],
)
@torch.no_grad()
def test_a_write_into_protected_memory_is_refused_before_it_is_done(write):
    weight = torch.ones(2, 2)
    with guarded([weight]) as guard, pytest.raises(WriteError, match="writes into a parameter or a buffer"):
        write(weight)
    assert guard.refused and torch.equal(weight, torch.ones(2, 2))
    write(weight)
    assert not torch.equal(weight, torch.ones(2, 2))


@torch.no_grad()
def test_what_is_not_protected_may_be_written_and_the_write_counts():
    weight, own = torch.ones(2), torch.ones(2)
    with guarded([weight]) as guard:
        before = own._version
        own.add_(weight)
        weight.clone().zero_()
    assert own._version > before and not guard.refused and torch.equal(weight, torch.ones(2))


def test_random_numbers_come_from_the_stream_and_the_process_s_stay():
    stream = torch.Generator().manual_seed(7).get_state()
    before = torch.random.get_rng_state()
    with guarded((), stream) as guard:
        first = torch.rand(3), torch.randn(2), nn.functional.dropout(torch.ones(9))
        assert draws() == guard.draws == 3
    assert torch.equal(torch.random.get_rng_state(), before) and draws() == 0
    with guarded((), stream):
        again = torch.rand(3), torch.randn(2), nn.functional.dropout(torch.ones(9))
    torch.random.set_rng_state(stream)
    plain = torch.rand(3), torch.randn(2), nn.functional.dropout(torch.ones(9))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, plain, strict=True))


def test_draws_aside_do_not_count_and_are_drawn_once_more():
    with guarded(()) as guard:
        with aside():
            first = torch.rand(3)
        assert guard.draws == 0
        assert torch.equal(torch.rand(3), first) and guard.draws == 1
    with aside():  # Nor does it mind that there is no guard.
        torch.rand(1)


def test_a_guard_within_another_is_the_one_that_counts():
    outer_weight, inner_weight = torch.ones(1), torch.ones(1)
    with guarded([outer_weight]) as outer:
        with guarded([inner_weight]) as inner, pytest.raises(WriteError):
            inner_weight.add_(1)
        with pytest.raises(WriteError):
            outer_weight.add_(1)
    assert inner.refused and outer.refused


def test_a_forward_that_is_traced_writes_only_into_what_it_made():
    kept, calls = torch.ones(3), RealCalls()
    with guarded((), real_calls=calls):
        made = torch.zeros(3)
        made.add_(1)
        made[:1].mul_(2)
        with pytest.raises(UndecidableError, match="kept for later calls"):
            kept.add_(1)
        with pytest.raises(UndecidableError, match="kept for later calls"):
            kept[1:].add_(1)  # A view of it is none of its own.
        calls.written.add(memory_of(made))
        with pytest.raises(UndecidableError, match="writes data into a tensor that it made"):
            made.sum()
    assert torch.equal(kept, torch.ones(3))


def test_memory_is_that_of_the_storage():
    x = torch.zeros(4, 4)
    assert memory_of(x) == memory_of(x[1:, 2]) == memory_of(x.t().detach()) != memory_of(x.clone())
    empty = torch.empty(0), torch.empty(0)
    assert len({memory_of(tensor) for tensor in empty} - {0}) == 2
    assert memory_of(torch.eye(2).to_sparse()) == 0
