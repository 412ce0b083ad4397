"""Which kernel computes which operator: the table of rules, and the functions that read an operator's arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from qcore_torch_kernels.float_kernel import FloatKernel
from qcore_torch_kernels.sums import why_inexact
from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import Declined, LoweringRule, QuantizedCall
from qcore_fbgemm import kernels
from qcore_fbgemm.observers import is_depthwise, largest_sum


def _inexact(call: QuantizedCall, largest_pair: Callable[[Tensor], int], axis: int = 0) -> Declined | None:
    """Why the kernel would compute something wrong, if it would.

    Args:
        call: of an operator with a weight.
        largest_pair: what a pair of weights whose products are added in 16 bits adds up to at most.
        axis: of the weight's output channels.
    """
    input = call.inputs[0] if call.inputs else None
    weight = call.weight
    if input is None:
        weight = replace(weight, scale=weight.scale / kernels.DYNAMIC_UNIT)
    reason = why_inexact(weight, call.bias, input, call.output, axis=axis)
    if reason is not None:
        return Declined(reason)
    if kernels.has_vnni() and not is_depthwise(weight.values):
        return None
    saturates = largest_pair(weight.values) * (255 if input is None else input.quant_max) > 2**15 - 1
    return _SATURATES if saturates else None


_SATURATES = Declined("weights could saturate in 16 bits on this CPU; use a PerChannelMinMaxObserver for them")


def conv(call: QuantizedCall) -> nn.Module | Declined:
    """A convolution."""
    _, _, _, stride, padding, dilation, groups = call.args
    padding = _int_padding(padding, call.weight.values.shape[2:], dilation)
    if padding is None:
        return Declined("padding 'same' isn't symmetric here")
    if declined := _inexact(call, largest_sum):
        return declined
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
    if declined := _inexact(call, _any_pair, axis=1):
        return declined
    _, _, _, stride, padding, output_padding, groups, dilation = call.args
    if _takes_the_direct_kernel(call.weight.values, padding, dilation, groups):
        return Declined("FBGEMM's kernel for this form is wrong")
    geometry = (list(stride), list(padding), list(output_padding), list(dilation), groups)
    return kernels.QConvTranspose(call.weight, call.bias, call.quantized_output, geometry, call.inputs[0].quant_max)


def _any_pair(weight: Tensor) -> int:
    """The largest that any two weights add up to."""
    return 2 * int(weight.to(torch.int32).abs().max())


def _takes_the_direct_kernel(weight: Tensor, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether FBGEMM would take its direct kernel for a transposed convolution, which reads memory that nobody wrote.

    Found by experiment: of 2 rows and up to 6 columns, with steps of up to 2, and whole octets of channels. Wider
    kernels and steps are left out, too, for what lies behind a bound may change.

    Args:
        weight: (in, out / groups, ...).
        padding: of the convolution; with any it isn't taken.
        dilation: likewise.
        groups: likewise.
    """
    is_plain = groups == 1 and not any(padding) and max(dilation) == 1
    return weight.dim() == 4 and weight.shape[2] == 2 and is_plain and not any(n % 8 for n in weight.shape[:2])


def linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer."""
    if declined := _inexact(call, largest_sum):
        return declined
    if call.output is None:
        return kernels.QLinearToFloat(call.weight, call.bias, call.inputs[0])
    return kernels.QLinear(call.weight, call.bias, call.quantized_output, call.inputs[0].quant_max)


def dynamic_linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer that takes its input's range at run time."""
    if call.dynamic != (0, 255):
        return Declined(f"the kernel rounds to 0..255, not to {call.dynamic}")
    if declined := _inexact(call, largest_sum):
        return declined
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
