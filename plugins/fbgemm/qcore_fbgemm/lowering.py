"""Which kernel computes which operator: the table of rules, and the functions that read an operator's arguments."""

from typing import Any

import torch
from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import Declined, FloatKernel, LoweringRule, QuantizedCall
from qcore_fbgemm import kernels
from qcore_fbgemm.observers import is_depthwise, largest_sum


def _saturates(call: QuantizedCall, weight: Tensor, largest: int) -> bool:
    """Whether a pair of products could overflow 16 bits on this CPU, if ``largest`` is what its weights add up to."""
    if kernels.has_vnni() and not is_depthwise(weight):
        return False
    return largest * (call.inputs[0].quant_max if call.inputs else 255) > 2**15 - 1


_SATURATES = Declined("weights could saturate in 16 bits on this CPU; use a PerChannelMinMaxObserver for them")


def conv(call: QuantizedCall) -> nn.Module | Declined:
    """A convolution."""
    assert call.weight is not None
    _, _, _, stride, padding, dilation, groups = call.args
    padding = _int_padding(padding, call.weight.values.shape[2:], dilation)
    if padding is None:
        return Declined("padding 'same' isn't symmetric here")
    if _saturates(call, call.weight.values, largest_sum(call.weight.values)):
        return _SATURATES
    geometry = (list(stride), padding, list(dilation), groups)
    return kernels.QConv(call.weight, call.bias, call.quantized_output, geometry, call.inputs[0].quant_max)


def _int_padding(padding: Any, kernel: Any, dilation: Any) -> list[int] | None:
    """Padding as numbers; ``None`` if it isn't the same on both sides."""
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return [number // 2 for number in total] if all(number % 2 == 0 for number in total) else None
    return list(padding)


def conv_transpose(call: QuantizedCall) -> nn.Module | Declined:
    """A transposed convolution."""
    assert call.weight is not None
    if _saturates(call, call.weight.values, 2 * int(call.weight.values.to(torch.int32).abs().max())):
        return _SATURATES
    _, _, _, stride, padding, output_padding, groups, dilation = call.args
    geometry = (list(stride), list(padding), list(output_padding), list(dilation), groups)
    return kernels.QConvTranspose(call.weight, call.bias, call.quantized_output, geometry, call.inputs[0].quant_max)


def linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer."""
    assert call.weight is not None
    if _saturates(call, call.weight.values, largest_sum(call.weight.values)):
        return _SATURATES
    if call.output is None:
        return kernels.QLinearToFloat(call.weight, call.bias, call.inputs[0])
    return kernels.QLinear(call.weight, call.bias, call.quantized_output, call.inputs[0].quant_max)


def dynamic_linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer that takes its input's range at run time."""
    assert call.weight is not None
    if call.dynamic != (0, 255):
        return Declined(f"the kernel rounds to 0..255, not to {call.dynamic}")
    if _saturates(call, call.weight.values, largest_sum(call.weight.values)):
        return _SATURATES
    return kernels.QDynamicLinear(call.weight, call.bias)


def add(call: QuantizedCall) -> nn.Module | Declined:
    """A sum of two activations; with a number, in float."""
    return kernels.QAdd(call.quantized_output) if len(call.inputs) == 2 else _float_kernel(call)


def mul(call: QuantizedCall) -> nn.Module | Declined:
    """A product of two activations; with a number, in float."""
    return kernels.QMul(call.quantized_output) if len(call.inputs) == 2 else _float_kernel(call)


def clamp(call: QuantizedCall) -> nn.Module | Declined:
    """A clamp that no quantize absorbed; input and output have the same qparams."""
    return kernels.QClamp(call.quantized_output.clamped(*call.args[1:3]))


def pad(call: QuantizedCall) -> nn.Module | Declined:
    """Padding; a quantized tensor is padded by a real zero, not by an integer."""
    return kernels.QPad(call.args[1], call.args[2])


def _float_kernel(call: QuantizedCall) -> nn.Module:
    return FloatKernel(call, kernels.Quantize, kernels.Dequantize)


def _in_float(operator: Operator) -> LoweringRule:
    return FloatKernel.rule(operator, kernels.Quantize, kernels.Dequantize)


RULES: tuple[LoweringRule, ...] = (
    LoweringRule(op.LINEAR, dynamic_linear, is_dynamic=True),
    *(LoweringRule(operator, conv) for operator in op.CONV),
    *(LoweringRule(operator, conv_transpose) for operator in op.CONV_TRANSPOSE),
    LoweringRule(op.LINEAR, linear),
    LoweringRule(op.ADD, add),
    LoweringRule(op.MUL, mul),
    LoweringRule(op.CLAMP, clamp),
    LoweringRule(op.PAD, pad),
    *(
        _in_float(operator)
        for operator in (
            *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL, op.MEAN, op.HARDSWISH, op.HARDSIGMOID, op.SIGMOID, op.TANH,
            op.LEAKY_RELU, op.ELU, op.INTERPOLATE, op.CAT, op.STACK, op.MAX_POOL[2],
        )
    ),
)  # fmt: skip
