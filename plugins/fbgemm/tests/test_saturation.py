"""Sums of pairs in 16 bits: which weights the kernels pair, and that nothing that could saturate gets to a kernel."""

import pytest
import torch
from qcore_fbgemm import kernels
from qcore_fbgemm.backend_config import backend_config
from qcore_fbgemm.observers import (
    DepthwiseSaturationFreePerChannelMinMaxObserver,
    SaturationFreePerChannelMinMaxObserver,
    largest_sum,
    stand_ins,
)
from qcore_torch_kernels.elementwise import Quantize
from qcore_torch_kernels.engines import has_engine
from qcore_torch_kernels.testing import LAYERS, SaturationSuite, two_weights
from torch import nn

from qcore.dtypes import QScheme
from qcore.lowering import QParams, QuantizedWeight
from qcore.observer import PerChannelMinMaxObserver

pytestmark = pytest.mark.skipif(not has_engine(kernels.ENGINE), reason="no FBGEMM here")

INPUT = QParams(1.0, 0, 0, 255, torch.uint8)
OUTPUT = QParams(300.0, 0, 0, 255, torch.uint8)


class TestSaturation(SaturationSuite):
    backend = "fbgemm"
    observer = SaturationFreePerChannelMinMaxObserver

    def adds_pairs(self, is_depthwise: bool) -> bool:
        return is_depthwise or not kernels.has_vnni()


@pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
def test_a_kernel_is_wrong_only_where_the_observer_expects_it(shape: tuple[int, ...], groups: int):
    every = two_weights(shape, 127)
    channels, dimensions = shape[0], len(shape) - 2
    x = Quantize(INPUT)(torch.full((1, shape[1] * groups, *[8] * dimensions), 255.0))
    exact = round(2 * 127 * 255 / OUTPUT.scale)
    for weight in every.split(channels):
        count = len(weight)
        values = torch.cat([weight, weight.new_zeros(channels - count, *shape[1:])])
        quantized = QuantizedWeight(values, torch.tensor(1.0), torch.tensor(0), None)
        if dimensions:
            geometry = ([1] * dimensions, [0] * dimensions, [1] * dimensions, groups)
            kernel: nn.Module = kernels.QConv(quantized, None, OUTPUT, geometry)
        else:
            kernel = kernels.QLinear(quantized, None, OUTPUT)
        result = (kernel(x).dequantize() / OUTPUT.scale).movedim(1, 0).reshape(channels, -1).amax(1)
        for row, found in zip(weight, result.tolist(), strict=False):
            assert abs(found - exact) <= 1 or largest_sum(row[None]) > 128


def test_with_vnni_only_depthwise_weights_grow():
    own = stand_ins(has_vnni=True)[PerChannelMinMaxObserver]
    assert own is DepthwiseSaturationFreePerChannelMinMaxObserver
    for shape, grows in (((4, 8, 3, 3), False), ((4, 1, 3, 3), True), ((4, 8), False), ((4, 1), False)):
        observer = own(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
        observer(torch.ones(shape))
        assert (observer.growth > 1).all() == grows


@pytest.mark.parametrize("has_vnni", [False, True])
def test_weights_of_one_scale_keep_to_7_bits_where_pairs_saturate(has_vnni: bool):
    for config in backend_config(has_vnni).configs:
        for dtype_config in config.dtype_configs:
            constraints = dtype_config.weight_constraints
            if constraints.qschemes == (QScheme.per_tensor_symmetric,):
                is_narrow = constraints.quant_max_upper_bound == 64
                assert is_narrow == (not has_vnni or config.condition is not None)
