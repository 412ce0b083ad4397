"""A small model, and requests for it."""

import torch
from torch import nn

import qcore
from qcore import MinMaxObserver, QConfig, QConfigMapping


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


INPUTS = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),)


INT8 = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric))


def prepare(module=None, mapping=None, inputs=INPUTS, **arguments):
    mapping = QConfigMapping().set_global(INT8) if mapping is None else mapping
    return qcore.prepare_fx(module or model(), mapping, inputs, backend="reference", **arguments)


def calibrated():
    prepared = prepare()
    prepared(*INPUTS)
    return prepared
