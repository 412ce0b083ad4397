"""Core and plugins from their wheels, as a user installs them."""

from importlib.metadata import files, requires
from pathlib import Path

import pytest
import torch
from torch import nn

import qcore

DISTRIBUTIONS = {
    "fbgemm": "qcore-fbgemm",
    "qnnpack": "qcore-qnnpack",
    "x86_onednn": "qcore-x86-onednn",
    "x86": "qcore-x86-onednn",
    "onednn": "qcore-x86-onednn",
}


def test_all_backends_are_listed_with_their_distributions():
    listed = {name: b.distribution for b in qcore.installed_backends() for name in (b.name, *b.aliases)}
    assert listed == {"reference": "qcore-fx", **DISTRIBUTIONS}


@pytest.mark.parametrize("distribution", sorted(set(DISTRIBUTIONS.values())))
def test_a_plugin_pulls_in_the_core_and_is_typed(distribution):
    assert any(requirement.startswith("qcore-fx") for requirement in requires(distribution))
    listed = {str(path) for path in files(distribution)}
    package = distribution.replace("-", "_")
    assert f"{package}/py.typed" in listed
    assert not any(path.startswith(("tests/", "qcore/")) for path in listed)


@pytest.mark.parametrize("backend", sorted(DISTRIBUTIONS))
def test_a_stranger_s_ten_lines(backend):
    availability = qcore.get_backend(backend).availability
    if not availability.ok:
        pytest.skip(availability.reason)
    assert "site-packages" in Path(qcore.__file__).parts
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), (batches[0],))
    qcore.calibrate(prepared, batches)
    quantized = qcore.convert_fx(prepared)
    error = model(batches[0]) - quantized(batches[0])
    assert error.norm() < 0.05 * model(batches[0]).norm()
    assert all(decision.kernel for decision in qcore.explain(quantized).decisions)
