"""Runs of the user's model: from one start, on a twin, and guarded unless it is known to be harmless."""

import torch
from torch import nn

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
