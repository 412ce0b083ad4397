"""Weights as integers: rounding several at once changes nothing."""

import pytest
import torch
from torch import nn

import qcore
from qcore import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping, QScheme
from qcore.errors import ConfigError
from qcore.fx.weights import FloatWeight, quantize_weights
from qcore.qconfig import observer_traits
from qcore.quantization_plan import QParamsSpec


class Widened(PerChannelMinMaxObserver):
    """A backend's observer: some channels get a larger scale, by what stands in them."""

    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return torch.where(self.max_val > -self.min_val, 1.5 * scale, scale), zero_point


def tensor(constructor):
    traits = observer_traits(constructor)
    return QParamsSpec(constructor, traits, traits.quant_min, traits.quant_max)


PER_CHANNEL = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
CONSTRUCTORS = {
    "nearest": PER_CHANNEL,
    "sum preserving": PER_CHANNEL.with_args(rounding="sum_preserving"),
    "affine": PerChannelMinMaxObserver.with_args(dtype=torch.int8),
    "input channels": PER_CHANNEL.with_args(ch_axis=1),
    "whole": MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric),
}


def assert_same(found, wanted):
    assert found.axis == wanted.axis
    for name in ("values", "scale", "zero_point"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("stand_ins", [{}, {PerChannelMinMaxObserver: Widened}], ids=["plain", "widened"])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("odd", [False, True])
def test_weights_rounded_together_are_those_rounded_one_by_one(constructor, stand_ins, odd):
    torch.manual_seed(0)
    shapes = [(4, 4, 3, 3), (32, 1, 3, 3), (16, 8), (4, 4, 3, 3), (300, 1000)]
    weights = [
        FloatWeight(f"{number}", torch.randn(shape) * 10.0 ** (number % 5 - 2), tensor(CONSTRUCTORS[constructor]))
        for number, shape in enumerate(shapes * 4)
    ]
    if odd:
        weights[5].values[1] = 0.0  # A channel that takes its scale from its neighbours.
        weights[6].values[0] = 1e-42
    together = quantize_weights(weights, stand_ins)
    for weight, found in zip(weights, together, strict=True):
        assert_same(found, quantize_weights([weight], stand_ins)[0])
        assert found.values.untyped_storage().nbytes() == weight.values.numel()


def test_of_many_weights_the_one_with_nan_is_named():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    mapping = QConfigMapping().set_global(QConfig(MinMaxObserver, PER_CHANNEL))
    prepared = qcore.prepare_fx(model.eval(), mapping, (torch.randn(2, 4),), backend="reference")
    qcore.calibrate(prepared, [torch.randn(2, 4)])
    with torch.no_grad():
        prepared.get_parameter("3.weight")[1, 2] = torch.nan
    with pytest.raises(ConfigError, match=r"the weight 3\.weight holds NaN"):
        qcore.convert_fx(prepared)
