"""A tracer that other threads don't notice."""

import torch
import torch.nn.functional as F
from torch import nn

import qcore
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
