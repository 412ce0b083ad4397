"""Which kernel computes which operator: the table of rules, and the functions that read an operator's arguments."""

from dataclasses import replace
from typing import Any

from qcore_torch_kernels.float_kernel import FloatKernel
from qcore_torch_kernels.sums import coarsened, why_inexact
from torch import nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import Declined, LoweringRule, QuantizedCall
from qcore_qnnpack import kernels


def _inexact(call: QuantizedCall, axis: int = 0) -> Declined | None:
    """Why the kernel would compute something wrong, if it would."""
    input = call.inputs[0] if call.inputs else None
    weight = call.weight
    if input is None:
        weight = replace(weight, scale=weight.scale / kernels.DYNAMIC_UNIT)
    reason = why_inexact(weight, call.bias, input, call.output, axis=axis, adds_bias=True)
    return None if reason is None else Declined(reason)


def _with_room_for_the_bias(call: QuantizedCall) -> QuantizedCall:
    return replace(call, weights=(coarsened(call.weight, call.bias, call.inputs[0], call.quantized_output),))


def conv(call: QuantizedCall) -> nn.Module | Declined:
    """A convolution."""
    call = _with_room_for_the_bias(call)
    _, _, _, stride, padding, dilation, groups = call.args
    padding = _int_padding(padding, call.weight.values.shape[2:], dilation)
    if padding is None:
        return Declined("padding 'same' isn't symmetric here")
    if declined := _inexact(call):
        return declined
    geometry = (list(stride), padding, list(dilation), groups)
    return kernels.QConv(call.weight, call.bias, call.quantized_output, geometry, call.inputs[0])


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
    if declined := _inexact(call, axis=1):
        return declined
    _, _, _, stride, padding, output_padding, groups, dilation = call.args
    geometry = (list(stride), list(padding), list(output_padding), list(dilation), groups)
    return kernels.QConvTranspose(call.weight, call.bias, call.quantized_output, geometry, call.inputs[0])


def linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer."""
    call = _with_room_for_the_bias(call)
    if declined := _inexact(call):
        return declined
    return kernels.QLinear(call.weight, call.bias, call.quantized_output, call.inputs[0])


def dynamic_linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer that takes its input's range at run time."""
    if call.dynamic != (0, 255):
        return Declined(f"the kernel rounds to 0..255, not to {call.dynamic}")
    if declined := _inexact(call):
        return declined
    return kernels.QDynamicLinear(call.weight, call.bias)


def add(call: QuantizedCall) -> nn.Module | Declined:
    """A sum of two activations; with a number, in float."""
    return kernels.QAdd(call.quantized_output) if len(call.inputs) == 2 else _float_kernel(call)


def mul(call: QuantizedCall) -> nn.Module | Declined:
    """A product of two activations; with a number, in float."""
    return kernels.QMul(call.quantized_output) if len(call.inputs) == 2 else _float_kernel(call)


def global_avg_pool(call: QuantizedCall) -> nn.Module | Declined:
    """An average over whole images; over parts of them, in float."""
    is_global = call.args[1] in (1, (1, 1), [1, 1])
    return kernels.QGlobalAvgPool(call.quantized_output) if is_global else _float_kernel(call)


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


def _by_table(operator: Operator) -> LoweringRule:
    """A function of single values; the table is what it gives in float."""

    def build(call: QuantizedCall) -> nn.Module | Declined:
        built = _in_float(operator).build(call)
        if isinstance(built, Declined):
            return built
        return kernels.QLookup(built, operator.name, call.inputs[0], call.quantized_output)

    return LoweringRule(operator, build)


RULES: tuple[LoweringRule, ...] = (
    LoweringRule(op.LINEAR, dynamic_linear, is_dynamic=True),
    *(LoweringRule(operator, conv) for operator in op.CONV),
    *(LoweringRule(operator, conv_transpose) for operator in op.CONV_TRANSPOSE[:2]),
    LoweringRule(op.LINEAR, linear),
    LoweringRule(op.ADD, add),
    LoweringRule(op.MUL, mul),
    LoweringRule(op.ADAPTIVE_AVG_POOL[1], global_avg_pool),
    LoweringRule(op.CLAMP, clamp),
    LoweringRule(op.PAD, pad),
    *(_by_table(operator) for operator in (op.HARDSWISH, op.HARDSIGMOID, op.SIGMOID, op.TANH, op.LEAKY_RELU, op.ELU)),
    *(
        _in_float(operator)
        for operator in (
            *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL[::2], op.MEAN, op.INTERPOLATE, op.CAT, op.STACK, op.MAX_POOL[2],
        )
    ),
)  # fmt: skip
