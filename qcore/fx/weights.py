"""The step of converting that turns weights into integers; small weights that are alike are rounded together.

A network has many weights of one shape, and for small ones each call of torch costs more than its arithmetic. Where an
observer treats every channel by itself, weights that differ in nothing but their values may as well be one weight with
the channels of all of them: the integers and the scales are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcore.errors import ConfigError
from qcore.fx.observe import make_observer
from qcore.observer import ObserverBase, StandIns
from qcore.quantization_plan import QParamsSpec

#: Numbers that are rounded together at most. Larger weights gain nothing, and what is joined is a copy.
JOINED_LIMIT = 1 << 18

#: A channel whose largest value is smaller may take its scale from the channels beside it.
_LEAST_RANGE = 1e-30


@dataclass(frozen=True, eq=False)
class FloatWeight:
    """A weight that is to be quantized.

    Attributes:
        name: for an error message.
        values: float.
        spec: of its qparams.
    """

    name: str
    values: Tensor
    spec: QParamsSpec


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers, ``(values - zero_point) * scale``.

    Attributes:
        values: the integers.
        scale: 0-d, or one for each channel.
        zero_point: likewise.
        axis: of the channels; ``None`` if it is quantized as a whole.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None


def quantize_weights(weights: Sequence[FloatWeight], stand_ins: StandIns) -> list[IntegerWeight]:
    """All weights as integers, in their order.

    Args:
        weights: none of them is changed.
        stand_ins: the backend's observers in the place of others.

    Raises:
        ConfigError: a weight holds NaN or infinity.
    """
    found: dict[int, IntegerWeight] = {}
    for numbers in _groups(weights):
        found.update(zip(numbers, _quantized([weights[number] for number in numbers], stand_ins), strict=True))
    return [found[number] for number in range(len(weights))]


def _groups(weights: Sequence[FloatWeight]) -> list[list[int]]:
    """The numbers of weights that may be rounded together."""
    groups: list[list[int]] = []
    open_groups: dict[object, tuple[list[int], int]] = {}
    for number, weight in enumerate(weights):
        values = weight.values
        kind = (weight.spec, values.shape[1:], values.dtype, values.device)
        members, size = open_groups.get(kind, ([], 0))
        if not members or values.dim() < 2 or size + values.numel() > JOINED_LIMIT:
            members, size = [], 0
            groups.append(members)
        members.append(number)
        open_groups[kind] = members, size + values.numel()
    return groups


def _quantized(weights: Sequence[FloatWeight], stand_ins: StandIns) -> list[IntegerWeight]:
    """Weights that differ in nothing but their values, rounded as one; one by one if some need a look of their own."""
    observer = make_observer(weights[0].spec, stand_ins)
    joined = weights[0].values
    if len(weights) > 1:
        joined = torch.cat([weight.values for weight in weights])
        if not _treats_apart(observer, joined):
            return [found for weight in weights for found in _quantized([weight], stand_ins)]
    observer(joined)
    if observer.nonfinite_count or not observer.has_data:
        raise ConfigError(f"the weight {weights[0].name} holds NaN or infinity; it can't be quantized")
    scale, zero_point = observer.calculate_qparams()
    integers = observer.quantize(joined)
    axis = (observer.ch_axis or 0) if observer.qscheme.per_channel else None
    if len(weights) == 1:
        return [IntegerWeight(integers, scale, zero_point, axis)]
    channels = [weight.values.shape[0] for weight in weights]
    parts = zip(*(whole.split(channels) for whole in (integers, scale, zero_point)), strict=True)
    # Copies, for a part of a tensor would keep all of it.
    return [IntegerWeight(values.clone(), scale.clone(), zero.clone(), axis) for values, scale, zero in parts]


def _treats_apart(observer: ObserverBase, joined: Tensor) -> bool:
    """Whether an observer finds for each of these channels what it finds without the others."""
    if not observer.treats_channels_apart or observer.ch_axis != 0:
        return False
    least, most = torch.aminmax(joined.flatten(1), dim=1)
    return bool(((torch.maximum(-least, most) > _LEAST_RANGE) & torch.isfinite(most - least)).all())
