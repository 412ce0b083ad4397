"""Which kernel computes which operator: the table of rules, and the functions that read an operator's arguments."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from qcore_torch_kernels.float_kernel import FloatKernel
from qcore_torch_kernels.kernel import PadKernel
from qcore_torch_kernels.lookup import LookupKernel
from qcore_torch_kernels.sums import why_inexact
from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import Declined, LoweringRule, QuantizedCall, QuantizedWeight
from qcore_x86_onednn import elementwise, integers, kernels
from qcore_x86_onednn.backend_config import FUSED_ACTIVATIONS, FUSED_FIXED

_Activation = tuple[str, list[float], str]
_NONE: _Activation = ("none", [], "")

#: Activations that a kernel computes itself, by operator; the function gets the activation's node's arguments.
_ACTIVATIONS: dict[Operator, Callable[[tuple[Any, ...]], _Activation]] = {
    op.HARDSWISH: lambda args: ("hardswish", [], ""),
    op.SILU: lambda args: ("swish", [], ""),
    op.GELU: lambda args: ("gelu", [], "none"),
    op.LEAKY_RELU: lambda args: ("leaky_relu", [float(args[1])], ""),
    op.TANH: lambda args: ("tanh", [], ""),
    op.HARDSIGMOID: lambda args: _NONE,  # It is within the weight and the bias.
}


def _activation(call: QuantizedCall) -> _Activation:
    if len(call.nodes) == 1:
        return _NONE
    found = op.operator_of(call.nodes[-1])
    return _NONE if found is None or found not in _ACTIVATIONS else _ACTIVATIONS[found](call.nodes[-1].args)


_SATURATES = Declined("weights could saturate in 16 bits on this CPU; use a PerChannelMinMaxObserver for them")


def _inexact(call: QuantizedCall, weight: QuantizedWeight, bias: Tensor | None) -> Declined | None:
    """Why the kernel would compute something wrong, if it would."""
    input = call.inputs[0] if call.inputs else None
    reason = why_inexact(weight, bias, input, call.output)
    if reason is not None:
        return Declined(reason)
    saturates = kernels.could_saturate(weight.values, 255 if input is None else input.quant_max)
    return _SATURATES if saturates else None


def _weight_and_bias(call: QuantizedCall) -> tuple[QuantizedWeight, Tensor | None]:
    """Those of a convolution or linear layer.

    A hard sigmoid after it is within them: ``x / 6 + 1 / 2``, cut where the integers of its fixed range end.
    """
    weight, bias = call.weight, call.bias
    if op.operator_of(call.nodes[-1]) is not op.HARDSIGMOID:
        return weight, bias
    sixth = torch.zeros(weight.values.shape[0], dtype=torch.float32) if bias is None else bias / 6
    return replace(weight, scale=weight.scale / 6), sixth + 0.5


def _conv_arguments(call: QuantizedCall) -> tuple[Any, ...] | Declined:
    weight, bias = _weight_and_bias(call)
    _, _, _, stride, padding, dilation, groups = call.args
    kernel = weight.values.shape[2:]
    padding = _int_padding(padding, kernel, dilation)
    if padding is None:
        return Declined("padding 'same' isn't symmetric here")
    if declined := _inexact(call, weight, bias):
        return declined
    merged = _groups_to_merge(weight.values, groups, padding)
    geometry = (list(stride), list(padding), list(dilation), groups)
    return weight, bias, call.inputs[0], call.output, _activation(call), geometry, merged


def _groups_to_merge(weight: Tensor, groups: int, padding: list[int]) -> int:
    """How many neighbouring groups to compute as one; 1 where the kernel for the groups as they are is fast.

    Groups whose channels are no multiple of 4, depthwise convolutions with several outputs for each input, and those
    of 3 dimensions fall to oneDNN's reference code, tens of times slower than what merging, which adds zeros, costs.
    oneDNN's depthwise kernel for VNNI is wrong where rows are padded and the kernel has one; that of groups isn't.
    """
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    is_wrong = weight.dim() == 4 and weight.shape[2] == 1 and padding[0] > 0
    if groups == 1 or (inputs == outputs == 1 and weight.dim() < 5 and not is_wrong):
        return 1
    number = math.lcm(4 // math.gcd(4, inputs), 4 // math.gcd(4, outputs))
    return number if groups % number == 0 else groups


def _int_padding(padding: Any, kernel: Any, dilation: Any) -> list[int] | None:
    """Padding as numbers; ``None`` if it isn't the same on both sides."""
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return [number // 2 for number in total] if all(number % 2 == 0 for number in total) else None
    return list(padding)


def conv(call: QuantizedCall) -> nn.Module | Declined:
    """A convolution, alone or with an activation."""
    arguments = _conv_arguments(call)
    return arguments if isinstance(arguments, Declined) else kernels.QConv(*arguments)


def conv_add(call: QuantizedCall) -> nn.Module | Declined:
    """A 2d convolution with a residual."""
    arguments = _conv_arguments(call)
    if isinstance(arguments, Declined):
        return arguments
    return kernels.QConvAdd(*arguments, other=call.inputs[1], overwrites=call.overwritable[1])


def linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer, alone or with an activation."""
    weight, bias = _weight_and_bias(call)
    if declined := _inexact(call, weight, bias):
        return declined
    return kernels.QLinear(weight, bias, call.inputs[0], call.output, _activation(call))


def dynamic_linear(call: QuantizedCall) -> nn.Module | Declined:
    """A linear layer that takes its input's range at run time."""
    if call.dynamic != (0, 255):
        return Declined(f"the kernel rounds to 0..255, not to {call.dynamic}")
    if declined := _inexact(call, call.weight, call.bias):
        return declined
    return kernels.QDynamicLinear(call.weight, call.bias)


def _binary(kernel: type[nn.Module]) -> Callable[[QuantizedCall], nn.Module | Declined]:
    def build(call: QuantizedCall) -> nn.Module | Declined:
        if len(call.inputs) != 2:
            return FloatKernel(call, kernels.Quantize, kernels.Dequantize)
        return kernel(*call.inputs, call.quantized_output)

    return build


def max_pool2d(call: QuantizedCall) -> nn.Module | Declined:
    """A maximum over windows."""
    return kernels.QMaxPool2d(tuple(call.args[1:]))


def clamp(call: QuantizedCall) -> nn.Module | Declined:
    """A clamp that no quantize absorbed; input and output have the same qparams."""
    return integers.QClamp(call.quantized_output.clamped(*call.args[1:3]))


def pad(call: QuantizedCall) -> nn.Module | Declined:
    """Padding by zero, which is another integer; what is padded by its own values only moves."""
    return Declined("") if call.args[2] != "constant" else PadKernel(call.inputs[0], call.args[1], call.computed)


def join(call: QuantizedCall) -> nn.Module | Declined:
    """A concatenation: of integers that mean the same as they are, of others in float."""
    return Declined("") if call.keeps_qparams else FloatKernel(call, kernels.Quantize, kernels.Dequantize)


def interpolate(call: QuantizedCall) -> nn.Module | Declined:
    """On integers, if they only move; else in float."""
    _, size, scale_factor, mode, _ = call.args
    built = _in_float(op.INTERPOLATE).build(call)
    if isinstance(built, Declined) or not call.keeps_qparams or mode not in ("nearest", "nearest-exact"):
        return built
    return integers.QNearest(size, scale_factor, mode)


def mean(call: QuantizedCall) -> nn.Module | Declined:
    """A mean over given dimensions."""
    built = _in_float(op.MEAN).build(call)
    _, dims, keepdim = call.args
    if isinstance(built, Declined) or not dims:
        return built
    return elementwise.QMean(tuple(dims), keepdim, call.inputs[0], call.quantized_output)


def adaptive_avg_pool(call: QuantizedCall) -> nn.Module | Declined:
    """A mean over all places; other sizes in float."""
    size = call.args[1]
    if any(length != 1 for length in size):
        operator = op.operator_of(call.nodes[0])
        assert operator is not None
        return _in_float(operator).build(call)
    return elementwise.QMean(tuple(range(-len(size), 0)), True, call.inputs[0], call.quantized_output)


def _in_float(operator: Operator) -> LoweringRule:
    return FloatKernel.rule(operator, kernels.Quantize, kernels.Dequantize)


def _by_table(operator: Operator) -> LoweringRule:
    """A function of single values; the table is what it gives in float."""

    def build(call: QuantizedCall) -> nn.Module | Declined:
        built = _in_float(operator).build(call)
        if isinstance(built, Declined):
            return built
        return LookupKernel(built(torch.arange(256).to(torch.uint8)), operator.name)

    return LoweringRule(operator, build)


RULES: tuple[LoweringRule, ...] = (
    LoweringRule(op.LINEAR, dynamic_linear, is_dynamic=True),
    LoweringRule((op.CONV[1], op.ADD), conv_add),
    *(LoweringRule(operator, conv) for operator in op.CONV),
    LoweringRule(op.LINEAR, linear),
    *(LoweringRule(fused, linear if fused[0] is op.LINEAR else conv) for fused in (*FUSED_ACTIVATIONS, *FUSED_FIXED)),
    LoweringRule(op.ADD, _binary(elementwise.QAdd)),
    LoweringRule(op.MUL, _binary(elementwise.QMul)),
    LoweringRule(op.MAX_POOL[1], max_pool2d),
    *(LoweringRule(operator, adaptive_avg_pool) for operator in op.ADAPTIVE_AVG_POOL),
    LoweringRule(op.MEAN, mean),
    LoweringRule(op.CLAMP, clamp),
    LoweringRule(op.INTERPOLATE, interpolate),
    LoweringRule(op.PAD, pad, takes_computed=True),
    *(LoweringRule(operator, join, takes_computed=True) for operator in (op.CAT, op.STACK)),
    # In float these take three times as long as by table; what is left in float below, no longer.
    *(_by_table(operator) for operator in (op.SIGMOID, op.HARDSIGMOID, op.TANH, op.ELU, op.SILU, op.GELU)),
    *(
        _in_float(operator)
        for operator in (
            *op.AVG_POOL, op.HARDSWISH, op.SOFTMAX, op.LEAKY_RELU,
            op.MAX_POOL[0], op.MAX_POOL[2],
        )
    ),
)  # fmt: skip
