"""The guard: writes into what is protected are refused, and random numbers drawn from a stream of the guard's."""

import pytest
import torch
from torch import nn

import qcore


def prepared_for(model, *inputs, custom=None):
    mapping = qcore.get_default_qconfig_mapping("reference")
    return qcore.prepare_fx(model.eval(), mapping, inputs, custom, backend="reference")


class Part(nn.Module):
    """A forward of our choice around two layers."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros(1))
        self.run, self.calls, self.log, self.seen = forward, 0, [], {}
        self.unregistered = [torch.zeros(2)]
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.run(self, x)


def shrink_all_weights(m, x):
    for parameter in m.parameters():
        parameter.data.mul_(0.5)
    return m.b(m.a(x))


@torch.no_grad()
def test_weights_that_change_at_each_call_are_no_weights_to_quantize():
    model = Part(shrink_all_weights)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(
        qcore.errors.UnsupportedQConfigWarning, match="writes into a tensor that is kept for later calls"
    ):
        prepared_for(model, torch.randn(3, 4))
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
