"""Runs of the user's model: from one start, on a twin, and guarded unless it is known to be harmless."""

import pytest
import torch
from torch import nn

from qcore.fx.runs import Runs, comparable
from qcore.fx.tracer import trace
from tests.models import prepared_for


@torch.no_grad()
def test_a_model_that_decides_by_its_own_state_is_run_from_the_same_state_each_time():
    class Starts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.started = nn.Linear(4, 4), False

        def forward(self, x):
            y = self.linear(x) if self.started else self.linear(x) * 2
            self.started = True
            return y

    model, x = Starts(), torch.randn(2, 4)
    prepared = prepared_for(model, (x,))
    assert model.started is False
    assert torch.allclose(prepared(x), 2 * model.linear(x), atol=1e-6)


@torch.no_grad()
def test_an_embedding_that_writes_into_its_weight():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 4))
    before = model[0].weight.clone()
    ids = torch.tensor([[0, 1]])
    prepared = prepared_for(model, (ids,))
    assert torch.equal(model[0].weight, before) and torch.equal(prepared.get_parameter("0.weight"), before)
    assert torch.allclose(prepared(ids), model(ids), atol=1e-6)


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        self.weight.mul_(2)
        return x * self.weight + torch.rand(2), float(self.count)


@torch.no_grad()
def test_each_run_starts_from_the_model_as_it_is_and_from_the_same_random_numbers():
    model, x = Writes(), torch.ones(2)
    runs = Runs(model)
    before = torch.random.get_rng_state()
    calls = []

    def run(twin):
        calls.append(twin)
        return twin(x)

    (first, count), (second, again) = runs.run(run), runs.run(run)
    assert torch.equal(first, second) and (count, again) == (1.0, 1.0)
    assert torch.equal(model.weight, torch.ones(2)) and float(model.count) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    # The write into a parameter is refused at the first run, which is made again on copies; then that is known.
    assert len(calls) == 3 and model not in calls
    expected, _ = Writes()(x)
    assert torch.equal(first, expected)


@torch.no_grad()
def test_a_run_that_needs_no_guard_has_the_model_s_own_parameters_and_none_is_copied():
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    runs = Runs(model)
    runs.trust(trace(model))
    seen = runs.run(lambda twin: (twin[0].weight.data_ptr(), twin is model))
    assert seen == (model[0].weight.data_ptr(), False)


def test_what_was_trusted_wrongly_and_draws_is_run_again_under_the_guard():
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    runs = Runs(model)
    runs.trust(trace(model))
    torch.manual_seed(3)
    first, second = (runs.run(lambda twin: torch.rand(2)) for _ in range(2))
    assert torch.equal(first, second)


def test_an_error_of_the_model_s_own_is_that_and_is_not_tried_again():
    calls = []

    def fails(twin):
        calls.append(1)
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        Runs(nn.Linear(2, 2)).run(fails)
    assert len(calls) == 1


def test_transformers_compute_by_operators_only_where_results_are_compared():
    with comparable():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
