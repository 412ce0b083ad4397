"""Networks trained by others, from float to int8 on every backend, by the public API alone."""

import functools
import sys
from pathlib import Path

import pytest
import torch

import qcore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import TARGETS
from benchmarks.metrics import agreement, sqnr_db
from examples.photos import evaluation_set, imagenet_photos
from examples.zoo import NETWORKS, MissingPackageError

try:
    EVALUATION = evaluation_set()
except MissingPackageError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@functools.cache
def float_side(network):
    """The float model, calibration photos, inputs and its outputs for them."""
    entry = NETWORKS[network]
    model = entry.build()
    photos = entry.preprocess(torch.stack(imagenet_photos(entry.input_size)[0]))
    inputs = entry.preprocess(torch.stack(EVALUATION.images))
    return model, photos, inputs, outputs(model, inputs)


def outputs(model, inputs):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in inputs.split(16)])


@functools.cache
def quantized(network, backend):
    model, photos, *_ = float_side(network)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), (photos[:1],))
    qcore.calibrate(prepared, photos.split(1))
    return qcore.convert_fx(prepared)


@pytest.mark.parametrize("network", ["efficientnet_lite0", "mobilenet_v2"])
def test_accuracy(network, installed_backend):
    """The bounds of ``benchmarks/accuracy.py``; agreement may miss by two images, which is how far ties reach."""
    *_, inputs, expected = float_side(network)
    if installed_backend == "reference":  # Slow, and only a yardstick.
        inputs, expected = inputs[:24], expected[:24]
    found = outputs(quantized(network, installed_backend), inputs)
    least_agreement, least_sqnr = TARGETS.get((network, installed_backend), TARGETS[(network, "fbgemm")])
    assert sqnr_db(expected, found) >= least_sqnr
    assert agreement(expected, found) >= least_agreement - 2 / len(inputs)


@pytest.mark.parametrize("network", ["efficientnet_lite0", "mobilenet_v2"])
def test_every_convolution_and_linear_runs_on_integers(network, installed_backend):
    plan = qcore.explain(quantized(network, installed_backend))
    weighted = [d for d in plan.decisions if d.operators[0] in ("conv2d", "linear")]
    assert len(weighted) > 40
    assert all(d.quantized for d in weighted)
    assert not [d.reason for d in plan.decisions if "no kernel" in d.reason and installed_backend != "reference"]


def test_the_float_network_is_left_alone(installed_backend):
    model, _, inputs, expected = float_side("mobilenet_v2")
    quantized("mobilenet_v2", installed_backend)
    assert torch.equal(model(inputs[:2]), outputs(model, inputs[:2]))
    assert not [module for module in model.modules() if isinstance(module, qcore.ObserverBase)]
    assert torch.allclose(outputs(model, inputs[:16]), expected[:16], atol=1e-4)


def test_the_saved_model_is_a_quarter_of_the_float_one(installed_backend):
    model, *_ = float_side("mobilenet_v2")

    def size(state):
        return sum(value.numel() * value.element_size() for value in state.values())

    ratio = size(quantized("mobilenet_v2", installed_backend).state_dict()) / size(model.state_dict())
    assert ratio < 0.29
