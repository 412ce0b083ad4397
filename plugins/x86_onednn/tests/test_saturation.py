"""Sums of pairs in 16 bits: which weights the kernels pair, and that nothing that could saturate gets to a kernel."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from qcore_torch_kernels.pair_limited import largest_pair_sum
from qcore_torch_kernels.testing import LAYERS, SaturationSuite, two_weights
from qcore_x86_onednn import kernels
from qcore_x86_onednn.backend_config import backend_config
from qcore_x86_onednn.observers import SaturationFreePerChannelMinMaxObserver, input_channel_pairs, largest_sum
from qcore_x86_onednn.plugin import qcore_observers
from torch import Tensor, nn

from qcore.dtypes import QScheme
from qcore.errors import BackendUnavailableError
from qcore.fx.operators import LINEAR
from qcore.lowering import QParams, QuantizedWeight
from qcore.observer import PerChannelMinMaxObserver

pytestmark = pytest.mark.skipif(bool(kernels.missing_kernels()), reason="no oneDNN here")

NO_ACTIVATION = ("none", [], "")
UNIT = QParams(1.0, 0, 0, 255, torch.uint8)


class TestSaturation(SaturationSuite):
    backend = "x86_onednn"
    observer = SaturationFreePerChannelMinMaxObserver

    def adds_pairs(self, is_depthwise: bool) -> bool:
        return not is_depthwise and not kernels.has_vnni()


def real_result(weight: Tensor, groups: int, x: Tensor, merged: int = 1) -> Tensor:
    """What a kernel computes, as float."""
    quantized = QuantizedWeight(weight, torch.tensor(1.0), torch.tensor(0), None)
    if weight.dim() == 2:
        return kernels.QLinear(quantized, None, UNIT, None, NO_ACTIVATION).pack()(x)
    n = weight.dim() - 2
    geometry = ([1] * n, [0] * n, [1] * n, groups)
    return kernels.QConv(quantized, None, UNIT, None, NO_ACTIVATION, geometry, merged).pack()(x)


def exact_result(weight: Tensor, groups: int, x: Tensor) -> Tensor:
    """The same in float, which is exact for sums below 2**24."""
    if weight.dim() == 2:
        return F.linear(x.float(), weight.float())
    convolution = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return convolution(x.float(), weight.float(), groups=groups)


@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
def test_a_kernel_is_wrong_only_where_the_observer_expects_it(shape: tuple[int, ...], groups: int, value: int):
    channels, dimensions = shape[0], len(shape) - 2
    x = torch.full((2, shape[1] * groups, *[6] * dimensions), 255, dtype=torch.uint8)
    is_paired = largest_pair_sum(input_channel_pairs(two_weights(shape, value))) > 128
    for weight, expected_wrong in zip(
        two_weights(shape, value).split(channels), is_paired.split(channels), strict=True
    ):
        full = torch.cat([weight, weight.new_zeros(channels - len(weight), *shape[1:])])
        wrong = (real_result(full, groups, x) != exact_result(full, groups, x)).movedim(1, 0).reshape(channels, -1)
        assert not (wrong.any(1)[: len(weight)] & ~expected_wrong).any()
        assert not (kernels.has_vnni() and wrong.any())


@pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
def test_sums_are_exact_at_the_bound(shape: tuple[int, ...], groups: int):
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, shape).to(torch.int8)
    pairs = weight.view(shape[0], shape[1], -1)
    if shape[1] > 1:  # The first of a pair leaves to the second what the bound allows.
        first = pairs[:, 0 : shape[1] // 2 * 2 : 2]
        pairs[:, 1::2] = torch.where(first < 0, -128 - first.int(), 128 - first.int()).clamp(max=127).to(torch.int8)
    assert 0 < largest_sum(weight) <= 128
    x = torch.full((3, shape[1] * groups, *[6] * (len(shape) - 2)), 255, dtype=torch.uint8)
    assert torch.equal(real_result(weight, groups, x), exact_result(weight, groups, x))
    x = torch.randint(0, 2, x.shape).to(torch.uint8) * 255
    assert torch.equal(real_result(weight, groups, x), exact_result(weight, groups, x))


def test_own_observers_only_where_pairs_saturate(monkeypatch: pytest.MonkeyPatch):
    for has_vnni in (False, True):
        monkeypatch.setattr(kernels, "has_vnni", lambda has_vnni=has_vnni: has_vnni)
        assert (PerChannelMinMaxObserver in qcore_observers()) == (not has_vnni)


@pytest.mark.parametrize("pairs_saturate", [False, True])
def test_weights_of_one_scale_keep_to_7_bits_where_pairs_saturate(pairs_saturate: bool):
    (linear,) = [config for config in backend_config(pairs_saturate).configs if config.pattern is LINEAR]
    (bound,) = {
        config.weight_constraints.quant_max_upper_bound
        for config in linear.dtype_configs
        if config.weight_constraints.qschemes == (QScheme.per_tensor_symmetric,)
    }
    assert bound == (64 if pairs_saturate else None)


@pytest.fixture
def vnni_forgotten() -> Iterator[None]:
    """As at the start of a process: nobody has asked yet what the kernels use."""
    kernels.has_vnni.cache_clear()
    yield
    kernels.has_vnni.cache_clear()


@pytest.mark.usefixtures("vnni_forgotten")
def test_instructions_that_the_kernels_do_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    # The first question, from which those of the kernels that it asks mustn't differ or come back to it.
    assert kernels.has_vnni() == (not kernels.measure_saturation())


@pytest.mark.usefixtures("vnni_forgotten")
def test_without_the_instructions_the_kernels_are_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not kernels.has_vnni()


@pytest.mark.parametrize("model", [nn.Conv2d(8, 8, 1), nn.Linear(8, 8)], ids=lambda model: type(model).__name__)
def test_a_model_from_another_cpu_refuses_to_be_wrong(monkeypatch: pytest.MonkeyPatch, model: nn.Module):
    x = torch.rand(2, 8) if isinstance(model, nn.Linear) else torch.rand(2, 8, 4, 4)
    monkeypatch.setattr(kernels, "has_vnni", lambda: True)
    nn.init.constant_(model.weight, 0.5)
    _, _, converted = TestSaturation().converted(model, x)
    monkeypatch.setattr(kernels, "has_vnni", lambda: False)
    with pytest.raises(BackendUnavailableError, match="could saturate"):
        copy.deepcopy(converted)(x)


#: Weight's shape, groups, and how many groups are computed as one.
MERGED = [
    ((20, 5, 3, 3), 4, 4),
    ((24, 3, 1, 1), 8, 4),
    ((12, 6, 3, 3), 4, 4),
    ((16, 4, 3, 3), 8, 2),
    ((9, 3, 3, 3), 3, 3),
    ((12, 3, 3), 4, 4),
    ((16, 1, 3, 3), 8, 4),
    ((10, 1, 3), 5, 5),
    ((8, 1, 3, 3, 3), 8, 4),
]


@pytest.mark.parametrize(("shape", "groups", "merged"), MERGED, ids=str)
def test_merged_groups_compute_the_same(shape: tuple[int, ...], groups: int, merged: int):
    torch.manual_seed(0)
    weight = torch.randint(-64, 65, shape).to(torch.int8)
    x = torch.randint(0, 256, (2, shape[1] * groups, *[6] * (len(shape) - 2))).to(torch.uint8)
    assert torch.equal(real_result(weight, groups, x, merged), exact_result(weight, groups, x))


def test_groups_are_merged_where_that_is_faster_and_exact():
    torch.manual_seed(0)
    x = torch.rand(2, 20, 6, 6)
    # Channels 1 and 2 make no pair, unless their group begins at an odd channel.
    for large, merged in (([0], 4), ([1, 2], 4 if kernels.has_vnni() else 1)):
        model = nn.Conv2d(20, 20, 1, groups=4)
        nn.init.zeros_(model.weight)
        model.weight.data[:, large] = 0.5
        reason, apart, converted = TestSaturation().converted(model, x)
        (kernel,) = [module for module in converted.modules() if isinstance(module, kernels.QConv)]
        assert not reason and apart <= 1.01 and kernel.merging() == merged
    _, _, converted = TestSaturation().converted(nn.Conv2d(20, 20, 3, groups=20), x)
    (kernel,) = [module for module in converted.modules() if isinstance(module, kernels.QConv)]
    assert kernel.merging() == 1
