"""quantize and dequantize on plain integer tensors, as torch.library operators of the namespace ``qcore``.

They define what a reference model computes: ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``, ties to
even, and ``x = (q - zero_point) * scale``. NaN becomes the zero point, an infinity the end on its side. ``x`` is
float32; float16 and bfloat16 are cast to it, which is exact, and other dtypes refused. Importing this
module registers them; they run on any device, under ``torch.export`` and with fake tensors. Scale (float32) and zero
point (int64) are tensors, so that a state_dict holds them: 0-d, or one entry for each channel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qcore.errors import DtypeError

_library = torch.library.Library("qcore", "DEF")


def as_float32(input: Tensor) -> Tensor:
    """What a quantize takes: float32, to which float16 and bfloat16 are cast, as nothing is lost by it.

    Raises:
        DtypeError: it is of another dtype.
    """
    if input.dtype is torch.float32:
        return input
    if input.dtype in (torch.float16, torch.bfloat16):
        return input.to(torch.float32)
    raise DtypeError(
        f"quantize takes float32 (and float16 and bfloat16, which it casts), found {input.dtype}; cast it: x.float()"
    )


def _quantize(input: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    input = as_float32(input)
    # A multiplication by the reciprocal, as torch's quantize_per_tensor computes it.
    steps = (input * (1.0 / scale)).round_().nan_to_num_(0.0).add_(zero_point).clamp_(low, high)
    if dtype == torch.int32:  # The nearest that float32 comes to its largest is one more.
        return torch.clamp(steps.to(torch.int64), low, high).to(dtype)
    return steps.to(dtype)


def _dequantize(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (input.to(torch.int32) - zero_point.to(torch.int32)).to(torch.float32) * scale


def _along(values: Tensor, input: Tensor, axis: int) -> Tensor:
    shape = [1] * input.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _quantize_per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    return _quantize(input, _along(scales, input, axis), _along(zero_points, input, axis), quant_min, quant_max, dtype)


def _dequantize_per_channel(input: Tensor, scales: Tensor, zero_points: Tensor, axis: int) -> Tensor:
    return _dequantize(input, _along(scales, input, axis), _along(zero_points, input, axis))


def dynamic_qparams(input: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point that spread the integers over a tensor's own range, zero included.

    Args:
        input: float32, of any shape.
        quant_min: smallest integer.
        quant_max: largest integer.

    Returns:
        Two 0-d tensors: the scale, float32, and the zero point, int64.
    """
    low, high = torch.aminmax(input) if input.numel() else (input.new_zeros(()), input.new_zeros(()))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max).to(torch.int64)


def straight_through(
    result: Tensor, input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """A quantized and dequantized tensor whose gradient is that of the tensor before, where that wasn't cut off.

    Args:
        result: after it.
        input: before it.
        scale: as in ``quantize_per_tensor``.
        zero_point: likewise.
        quant_min: likewise.
        quant_max: likewise.
    """
    if not isinstance(input, Tensor):  # A tracer's proxy is none.
        return result
    if not input.requires_grad and not in_forward_mode():
        return result
    kept = torch.where(_is_inside(input, scale, zero_point, quant_min, quant_max), input, 0.0)
    return result + (kept - kept.detach())


def in_forward_mode() -> bool:
    """Whether derivatives are computed forward, as by ``torch.func.jvp``."""
    return forward_ad._current_level >= 0


def _is_inside(input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    steps = torch.round(input.detach() * (1.0 / scale)) + zero_point
    return (quant_min <= steps) & (steps <= quant_max)


def _dynamic(input: Tensor, quant_min: int, quant_max: int) -> Tensor:
    input = as_float32(input)
    scale, zero_point = dynamic_qparams(input, quant_min, quant_max)
    return _dequantize(_quantize(input, scale, zero_point, quant_min, quant_max, torch.int32), scale, zero_point)


def _fake_quantized(input: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(input, dtype=arguments[-1])


def _fake_dequantized(input: Tensor, *_arguments: Any) -> Tensor:
    return torch.empty_like(input, dtype=torch.float32)


_QPARAMS, _CHANNEL_QPARAMS = "Tensor scale, Tensor zero_point", "Tensor scales, Tensor zero_points, int axis"
_RANGE = "int quant_min, int quant_max"

for _name, _arguments, _function, _fake in (
    ("quantize_per_tensor", f"{_QPARAMS}, {_RANGE}, ScalarType dtype", _quantize, _fake_quantized),
    ("dequantize_per_tensor", _QPARAMS, _dequantize, _fake_dequantized),
    (
        "quantize_per_channel",
        f"{_CHANNEL_QPARAMS}, {_RANGE}, ScalarType dtype",
        _quantize_per_channel,
        _fake_quantized,
    ),
    ("dequantize_per_channel", _CHANNEL_QPARAMS, _dequantize_per_channel, _fake_dequantized),
    ("dynamic_quantize_dequantize", _RANGE, _dynamic, _fake_dequantized),
):
    _library.define(f"{_name}(Tensor input, {_arguments}) -> Tensor")
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    _library.impl(_name, _fake, "Meta")  # Fake tensors use it, too; register_fake would read this file to find itself.


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.bounds = inputs
    ctx.save_for_backward(input)


def _dynamic_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (input,) = ctx.saved_tensors
    qparams = dynamic_qparams(as_float32(input), *ctx.bounds)
    return torch.where(_is_inside(input, *qparams, *ctx.bounds), gradient, 0.0).to(input.dtype), None, None


torch.library.register_autograd(
    "qcore::dynamic_quantize_dequantize", _dynamic_backward, setup_context=_keep_input, lib=_library
)

quantize_per_tensor = torch.ops.qcore.quantize_per_tensor.default
dequantize_per_tensor = torch.ops.qcore.dequantize_per_tensor.default
quantize_per_channel = torch.ops.qcore.quantize_per_channel.default
dequantize_per_channel = torch.ops.qcore.dequantize_per_channel.default
dynamic_quantize_dequantize = torch.ops.qcore.dynamic_quantize_dequantize.default
