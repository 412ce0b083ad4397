"""The core from its wheel and nothing else: it prepares, calibrates, converts and runs."""

from importlib.metadata import PackageNotFoundError, distribution, files
from pathlib import Path

import pytest
import torch
from torch import nn

import qcore


def test_it_is_the_wheel_that_is_tested():
    assert "site-packages" in Path(qcore.__file__).parts
    listed = {str(path) for path in files("qcore-fx")}
    assert {"qcore/py.typed", "qcore/plugins/hookspecs.py"} <= listed
    assert any(path.endswith("LICENSE") for path in listed)


@pytest.mark.parametrize("name", ["qcore-fbgemm", "qcore-qnnpack", "qcore-x86-onednn"])
def test_no_plugin_is_there(name):
    with pytest.raises(PackageNotFoundError):
        distribution(name)


def test_only_the_reference_backend_is_listed_and_it_is_the_default():
    assert [found.name for found in qcore.installed_backends()] == ["reference"]
    assert qcore.get_default_qconfig_mapping().backend == "reference"


def test_a_stranger_s_ten_lines():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(), (batches[0],))
    qcore.calibrate(prepared, batches)
    quantized = qcore.convert_fx(prepared)
    error = model(batches[0]) - quantized(batches[0])
    assert error.norm() < 0.05 * model(batches[0]).norm()
    assert len(qcore.explain(quantized).floating) == 0


def test_asking_for_a_plugin_tells_how_to_get_it():
    with pytest.raises(qcore.errors.BackendNotFoundError, match="installed are: reference.*pip install qcore-fbgemm"):
        qcore.get_default_qconfig_mapping("fbgemm")
