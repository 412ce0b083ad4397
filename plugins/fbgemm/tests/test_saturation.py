"""Sums of pairs in 16 bits: which weights the kernels pair, and that nothing that could saturate gets to a kernel."""

import itertools

import pytest
import torch
from qcore_fbgemm import kernels
from qcore_fbgemm.backend_config import backend_config
from qcore_fbgemm.observers import (
    DepthwiseSaturationFreePerChannelMinMaxObserver,
    SaturationFreePerChannelMinMaxObserver,
    largest_sum,
    observer_kernels,
)
from qcore_torch_kernels.elementwise import Quantize
from qcore_torch_kernels.engines import has_engine
from torch import Tensor, nn

import qcore
from qcore.dtypes import QScheme
from qcore.lowering import QParams, QuantizedWeight
from qcore.observer import MinMaxObserver, PerChannelMinMaxObserver
from qcore.testing import steps_apart

pytestmark = pytest.mark.skipif(not has_engine(kernels.ENGINE), reason="no FBGEMM here")

INPUT = QParams(1.0, 0, 0, 255, torch.uint8)
OUTPUT = QParams(300.0, 0, 0, 255, torch.uint8)

#: Weight's shape and groups: plain, pointwise, grouped, depthwise kernels, and a linear layer.
LAYERS = [
    ((8, 3, 3, 3), 1),
    ((8, 17, 1, 1), 1),
    ((16, 4, 3, 3), 4),
    ((12, 3, 3, 3), 4),
    ((8, 1, 3, 3), 8),
    ((8, 1, 5, 5), 8),
    ((17, 1, 3, 3), 17),
    ((8, 1, 4, 4), 8),
    ((8, 5, 3), 1),
    ((8, 1, 5), 8),
    ((4, 3, 2, 2, 2), 1),
    ((8, 1, 3, 3, 3), 8),
    ((8, 33), 1),
]


def two_weights(shape: tuple[int, ...]) -> Tensor:
    """Weights that are 127 at two places and 0 elsewhere, for all pairs of places: (pairs, *shape[1:])."""
    count = torch.Size(shape[1:]).numel()
    pairs = list(itertools.combinations(range(count), 2))
    rows = torch.zeros(len(pairs), count, dtype=torch.int8)
    for row, places in zip(rows, pairs, strict=True):
        row[list(places)] = 127
    return rows.view(-1, *shape[1:])


@pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
def test_a_kernel_is_wrong_only_where_the_observer_expects_it(shape: tuple[int, ...], groups: int):
    every = two_weights(shape)
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


@pytest.mark.parametrize("rounding", ["nearest", "sum_preserving"])
@pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
def test_the_observer_grows_only_channels_that_need_it(shape: tuple[int, ...], groups: int, rounding: str):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0] = 1.0
    weight[1] = 0
    weight[1].view(-1)[0] = 1.0
    arguments = {"dtype": torch.int8, "qscheme": QScheme.per_channel_symmetric, "rounding": rounding}
    plain, own = PerChannelMinMaxObserver(**arguments), SaturationFreePerChannelMinMaxObserver(**arguments)
    plain(weight), own(weight)
    assert largest_sum(own.quantize(weight)) <= 128
    growth = own.calculate_qparams()[0] / plain.calculate_qparams()[0]
    assert growth[0] > 1.9 and growth[1] == 1 and growth.max() < 2.1


def test_with_vnni_only_depthwise_weights_grow():
    own = observer_kernels(has_vnni=True)[PerChannelMinMaxObserver]
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


def _declined(model: nn.Module, x: Tensor, mapping: qcore.QConfigMapping) -> tuple[str, float]:
    prepared = qcore.prepare_fx(model.eval(), mapping, (x,), backend="fbgemm")
    prepared(x)
    reference, converted = qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)
    (decision,) = qcore.explain(converted).quantized
    return decision.reason, steps_apart(reference, reference(x), converted(x))[0]


class _Own(PerChannelMinMaxObserver):
    """An observer that the backend doesn't know."""


def test_what_could_saturate_is_declined_and_right():
    weight = _Own.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
    x = torch.rand(2, 8, 5, 5)
    for model in (nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)):
        nn.init.constant_(model.weight, 0.5)
        mapping = qcore.QConfigMapping().set_global(qcore.QConfig(MinMaxObserver, weight))
        reason, apart = _declined(nn.Sequential(model), x, mapping)
        assert ("could saturate" in reason) == (model.groups == 8 or not kernels.has_vnni())
        assert apart <= 1.01


def test_activations_of_7_bits_take_weights_of_8():
    weight = _Own.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
    activation = MinMaxObserver.with_args(reduce_range=True)
    model = nn.Conv2d(8, 8, 3)
    nn.init.constant_(model.weight, 0.5)
    mapping = qcore.QConfigMapping().set_global(qcore.QConfig(activation, weight))
    reason, apart = _declined(nn.Sequential(model), torch.rand(2, 8, 5, 5), mapping)
    assert not reason and apart <= 1.01
