"""A model, a config and a request, for tests of what is planned."""

import torch
from torch import nn

import qcore
from qcore import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    MinMaxObserver,
    QConfig,
    QConfigMapping,
    QScheme,
)
from qcore.fx.observe import observer_nodes

WEIGHT = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)


OPEN = QConfig(MinMaxObserver, WEIGHT)


U8 = DTypeConfig(torch.uint8, torch.uint8, torch.int8)


class Calls(nn.Module):
    """A model with a few layers whose forward is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def model(forward, **layers):
    return Calls(forward, **layers).eval()


def prepare(made, mapping=None, shape=(2, 4, 6, 6), config=None, **arguments):
    mapping = QConfigMapping().set_global(OPEN) if mapping is None else mapping
    backend = {} if config else {"backend": "reference"}
    return qcore.prepare_fx(made, mapping, (torch.randn(shape),), backend_config=config, **backend, **arguments)


def observed(prepared):
    """Observed values with the number of their observer, in the order of execution."""
    return [(node.args[0].name, number) for node, number in observer_nodes(prepared, qcore.explain(prepared).observers)]


def conv(**arguments):
    return nn.Conv2d(4, 4, 3, padding=1, **arguments)


def config(*patterns):
    made = BackendConfig("test")
    for pattern in patterns:
        made.set_backend_pattern_config(pattern)
    return made


LINEARS = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()


def linear_config(dtype_config):
    return config(BackendPatternConfig(nn.Linear).add_dtype_config(dtype_config))
