"""The guard: writes into what is protected are refused, and random numbers drawn from a stream of the guard's."""

import pytest
import torch
from torch import nn

import qcore
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
