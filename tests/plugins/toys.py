"""Toy plugins, what they answer, and a model to prepare on them."""

import sys
from types import SimpleNamespace

import torch
from torch import nn

import qcore
from qcore.plugins import reference
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl

with torch.random.fork_rng(devices=()):
    torch.manual_seed(0)  # Whether another model's results differ mustn't hang on chance.
    MODEL = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    INPUTS = (torch.randn(2, 4),)


def plugin(name="toy", **changes):
    """A minimal plugin as an object; ``changes`` replace hooks, ``None`` leaves one out."""
    hooks = {
        "qcore_backend_info": lambda: BackendInfo(name, PLUGIN_API),
        "qcore_probe": lambda: Availability(True, isa="any"),
        "qcore_backend_config": lambda: reference.qcore_backend_config(),
        "qcore_default_qconfig_mapping": lambda version: reference.qcore_default_qconfig_mapping(version),
        **changes,
    }
    return SimpleNamespace(**{key: hookimpl(function) for key, function in hooks.items() if function is not None})


def prepared(backend=None, **arguments):
    mapping = qcore.get_default_qconfig_mapping("reference")
    mapping.backend = None
    return qcore.prepare_fx(MODEL, mapping, INPUTS, backend=backend, **arguments)


def nothing(*_arguments, **_keywords):
    return None


def fail(*_arguments, **_keywords):
    raise KeyError("boom")


def leave(*_arguments, **_keywords):
    sys.exit(3)


def config(*elements, **changes):
    made = qcore.BackendPatternConfig(elements if len(elements) > 1 else elements[0])
    made.add_dtype_config(qcore.DTypeConfig())
    vars(made).update(changes)
    return qcore.BackendConfig("toy").set_backend_pattern_config(made)


def mapping(observer):
    return qcore.QConfigMapping().set_global(qcore.QConfig(observer, qcore.default_weight_observer))
