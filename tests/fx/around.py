"""Models in which something of the user's stands around a graph."""

import torch
from torch import nn

import qcore


def mapping(backend):
    return qcore.get_default_qconfig_mapping(backend)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Host(Around):
    """Stays Python, with a graph in the place of what it holds."""

    def forward(self, x):
        return x if x.sum() > 1e9 else self.inner(x)


def prepared_for(model, x, backend, **custom):
    return qcore.prepare_fx(model.eval(), mapping(backend), (x,), backend=backend, **custom)


class Part(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))
