"""What code may do besides computing."""

import torch
from torch import nn

import qcore
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
