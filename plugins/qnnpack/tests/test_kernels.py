"""What this backend promises beyond the core's conformance suite."""

import subprocess
import sys

import pytest
import qcore_qnnpack.kernels as kernels
import torch
import torch.nn.functional as F
from qcore_torch_kernels.engines import has_engine
from qcore_torch_kernels.testing import EngineSuite, make, steps
from torch import nn

import qcore
from qcore.lowering import QParams

BACKEND = "qnnpack"

pytestmark = pytest.mark.skipif(not has_engine(kernels.ENGINE), reason="this torch has no such engine here")


class TestKernels(EngineSuite):
    backend = BACKEND
    transposed = 2


def test_scales_below_normal_numbers_are_left_to_float():
    x = 1e-37 * torch.randn(3, 4)
    _, converted = make(BACKEND, nn.Sequential(nn.Linear(4, 4, bias=False)), x)
    (decision,) = qcore.explain(converted).quantized
    assert "at an end of float32's range" in decision.reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted as Linux lists them")
def test_between_convolutions_no_thread_is_started():
    # torch's threads would spin on after their work, beside those of QNNPACK's own pool. In a fresh process there are
    # none until something starts them.
    script = """
import os, torch
from qcore.lowering import QParams
from qcore_qnnpack import kernels
torch.set_num_threads(1)
output = QParams(0.1, 128, 0, 255, torch.uint8)
quantize, add, pool, dequantize = (
    kernels.Quantize(output), kernels.QAdd(output), kernels.QGlobalAvgPool(output), kernels.Dequantize(output)
)
image = torch.randn(2, 256, 16, 16)

def run():
    x = kernels._channels_last(quantize(image))
    return dequantize(pool(add(x, x)))

first = run()
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
assert torch.equal(run(), first)
assert len(os.listdir("/proc/self/task")) == before
image + 1
assert len(os.listdir("/proc/self/task")) > before, "this torch starts no threads; the test shows nothing"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_images_are_rearranged_for_convolutions_as_they_are():
    output = QParams(0.1, 7, 0, 255, torch.uint8)
    quantize = kernels.Quantize(output)
    for shape in ((1, 3, 224, 224), (2, 3, 5, 7), (3, 1, 4, 4), (1, 40000, 2, 2), (0, 3, 4, 4)):
        x = torch.randn(shape)
        expected = quantize(x)
        moved = kernels._channels_last(expected)
        assert moved.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(moved.int_repr(), expected.int_repr())
        plain = torch.quantize_per_tensor(x, *quantize.qparams("output"), torch.quint8)
        assert torch.equal(expected.int_repr(), plain.int_repr())


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (3, 1000, 7, 7), (1, 4, 200, 200), (6, 4, 4)], ids=str)
def test_averages_over_whole_images(shape: tuple[int, ...]):
    x = kernels.Quantize(QParams(0.02, 131, 0, 255, torch.uint8))(torch.randn(shape))
    output = QParams(0.005, 90, 0, 255, torch.uint8)
    expected = kernels.Quantize(output)(F.adaptive_avg_pool2d(x.dequantize(), 1))
    found = kernels.QGlobalAvgPool(output)(x)
    assert found.shape == expected.shape
    assert (found.int_repr().int() - expected.int_repr().int()).abs().max() <= 1


@pytest.mark.parametrize(("size", "kernel"), [(1, "mean of integers"), (2, "float within the kernel")])
def test_only_averages_over_whole_images_are_taken_on_integers(size: int, kernel: str):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(size), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 6, 6)
    models = make(BACKEND, model, x)
    assert steps(models, x) <= 2.01
    assert qcore.explain(models[1]).quantized[1].kernel == kernel
