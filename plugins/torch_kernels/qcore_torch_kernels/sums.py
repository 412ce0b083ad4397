"""Whether integer arithmetic holds what weights and scales can give: sums in int32, scales in float32.

A kernel multiplies integers, adds the products in int32, multiplies the sum by a float and rounds it to an integer
again. Each of these steps has an end, behind which a native kernel wraps around and says nothing.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcore.errors import LoweringError

if TYPE_CHECKING:
    from qcore.lowering import QParams, QuantizedWeight

#: The largest sum, and the most steps that a result may lie from zero: the conversion to integers wraps there.
_LARGEST = 2**31 - 1
#: Scales, products and ratios of scales between these are float32's normal numbers, and so are their reciprocals.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-120, 2.0**120

_OVERFLOWS = "sums of its products could leave 32 bits"
_FAR = "its results could lie too many of its output's steps from zero"
_EXTREME_SCALES = "its scales, or a product or ratio of them, are at an end of float32's range"
_NO_NUMBER = "its bias holds NaN or infinity"
_COARSE_BIAS = "its bias would be rounded to steps larger than its output's"


def largest_sums(weight: Tensor, axis: int = 0) -> Tensor:
    """The largest that the weights of one sign add up to, for each output channel: a bound for every sum, in units of
    the largest input.

    Args:
        weight: integers.
        axis: of the output channels.

    Returns:
        int64, one for each place along ``axis``.
    """
    rows = weight.movedim(axis, 0).flatten(1)
    positive, negative = (part.sum(1, dtype=torch.int64) for part in (rows.clamp(min=0), rows.clamp(max=0)))
    return torch.maximum(positive, -negative)


def could_overflow(weight: Tensor, input_max: int = 255, axis: int = 0) -> bool:
    """Whether a sum of products could leave int32, whatever the input and its zero point are.

    Args:
        weight: int8.
        input_max: the largest integer that the activation takes; the smallest is 0 or more.
        axis: of the output channels; all along the others may meet in one sum.
    """
    products = weight.numel() // max(1, weight.shape[axis])
    if products * 128 * input_max <= _LARGEST:  # As nearly always; the weights need no look.
        return False
    return int(largest_sums(weight, axis).max()) * input_max > _LARGEST


def check_sums(weight: Tensor, input_max: int = 255, axis: int = 0) -> None:
    """Refuse a weight that was loaded into a kernel, where a rule would have declined it; arguments as above.

    Raises:
        LoweringError: a sum of products could leave int32.
    """
    if could_overflow(weight, input_max, axis):
        raise LoweringError(
            f"a weight of shape {tuple(weight.shape)} was loaded into a kernel for which it is too large: "
            f"{_OVERFLOWS}. Convert the model that the weight comes from, or load it into a reference model"
        )


def why_inexact(
    weight: "QuantizedWeight",
    bias: Tensor | None,
    input: "QParams | None",
    output: "QParams | None",
    *,
    axis: int = 0,
    adds_bias: bool = False,
) -> str | None:
    """Why a kernel of 32-bit sums would compute something wrong, for a rule to decline; ``None`` if it wouldn't.

    Args:
        weight: symmetric.
        bias: float32.
        input: qparams of the activation; ``None`` if they are found at run time.
        output: qparams of the result; ``None`` if it is float.
        axis: of the weight's output channels.
        adds_bias: whether the kernel rounds the bias to steps of the sums, and adds it to them as an integer.
    """
    input_max = 255 if input is None else input.quant_max
    if could_overflow(weight.values, input_max, axis):
        return _OVERFLOWS
    if weight.values.numel() == 0:
        return None
    if bias is not None and not bool(torch.isfinite(bias).all()):
        return _NO_NUMBER
    least, most = (float(extreme) for extreme in torch.aminmax(weight.scale))
    scales = [least, most]
    if input is not None:
        scales = [least, most, input.scale, input.scale * least, input.scale * most]
    if output is not None:
        scales += [output.scale, *(scale / output.scale for scale in scales[2:])]
    if not all(_SMALLEST_SCALE <= scale <= _LARGEST_SCALE for scale in scales):
        return _EXTREME_SCALES
    if input is None or output is None:
        return None
    if adds_bias and bias is not None and input.scale * most > output.scale:
        return _COARSE_BIAS
    steps = weight.scale.to(torch.float64) * input.scale
    added = torch.zeros((), dtype=torch.float64) if bias is None else bias.abs().to(torch.float64)
    if axis:  # A bias has the channels of all groups, and the sums those of one.
        added = added.max()
    # A bound of all sums suffices nearly always; only else are the weights looked at.
    bound = weight.values.numel() // weight.values.shape[axis] * 128.0 * input_max
    if _beyond(bound, steps, added, output, adds_bias) is None:
        return None
    sums = largest_sums(weight.values, axis).to(torch.float64) * input_max
    return _beyond(sums.max() if axis else sums, steps, added, output, adds_bias)


def coarsened(weight: "QuantizedWeight", bias: Tensor | None, input: "QParams", output: "QParams") -> "QuantizedWeight":
    """The same weight for a kernel that adds the bias as an integer, with larger steps where that would leave 32 bits.

    So it is with channels of next to no weights and a usual bias, such as dead ones into which a batch norm was folded.

    Args:
        weight: symmetric, with its output channels along axis 0.
        bias: float32.
        input: qparams of the activation.
        output: qparams of the result.

    Returns:
        Another weight if no result differs by more than a quarter of its step; else the same.
    """
    if bias is None or weight.axis != 0 or not bool(torch.isfinite(bias).all()):
        return weight
    scale = weight.scale.to(torch.float64)
    least = bias.abs().to(torch.float64) / (_LARGEST / 2 * input.scale)
    if not bool((least > scale).any()):
        return weight
    coarse = torch.maximum(scale, least).to(torch.float32)
    along = (-1, *[1] * (weight.values.dim() - 1))
    real = weight.values.to(torch.float64) * scale.view(along)
    values = torch.round(real / coarse.view(along))
    lost = (real - values * coarse.view(along)).abs().flatten(1).sum(1) * input.quant_max * input.scale
    if float(lost.max()) > output.scale / 4:
        return weight
    return replace(weight, values=values.to(weight.values.dtype), scale=coarse)


def _beyond(sums: float | Tensor, steps: Tensor, added: Tensor, output: "QParams", adds_bias: bool) -> str | None:
    """Which end is passed by sums of products, each of a step, to which a bias is added."""
    if float(((sums * steps + added) / output.scale).max()) > _LARGEST / 2:  # A zero point comes to it.
        return _FAR
    if adds_bias and float((sums + added / steps).max()) > _LARGEST:
        return _OVERFLOWS
    return None
