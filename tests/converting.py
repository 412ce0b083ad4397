"""Models on the reference backend, calibrated and converted."""

import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping, QScheme

WEIGHT = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)


MAPPING = QConfigMapping().set_global(QConfig(MinMaxObserver, WEIGHT))


def prepare(model, x, mapping=MAPPING):
    prepared = qcore.prepare_fx(model.eval(), mapping, (x,), backend="reference")
    with torch.no_grad():
        prepared(x)
    return prepared


def convert(model, x, mapping=MAPPING):
    return qcore.convert_to_reference_fx(prepare(model, x, mapping))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return F.linear(x, self.weight) + self.weight.sum()


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Functional()
        self.conv = nn.Linear(4, 4)

    def forward(self, x):
        return self.conv(self.inner(x)).relu()
