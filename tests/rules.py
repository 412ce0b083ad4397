"""A model with modules in modules, and qconfigs that can be told apart."""

import torch
from torch import nn

import qcore
from qcore import MinMaxObserver, QConfig

WEIGHT = MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)


def q(number):
    """Distinguishable qconfigs."""
    return QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=number), WEIGHT)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.add(self.linear(x), x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = Inner()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        x = self.inner(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return (x + x).relu()


def prepare(mapping, model=None, **arguments):
    return qcore.prepare_fx(model or Outer().eval(), mapping, (torch.randn(2, 4),), backend="reference", **arguments)
