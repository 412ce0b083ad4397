"""Which kernel computes which operator: the table of rules, and the functions that read an operator's arguments."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from qcore_torch_kernels import rules
from qcore_torch_kernels.lookup import LookupKernel
from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import Declined, LoweringRule, QParams, QuantizedCall, QuantizedWeight
from qcore_x86_onednn import elementwise, kernels
from qcore_x86_onednn.backend_config import FUSED_ACTIVATIONS, FUSED_FIXED

#: What is packed for oneDNN's dynamic kernel is the weight as it is.
_EXACT = rules.Exact(kernels.could_saturate, unit=1.0)
IN_FLOAT = rules.InFloat(kernels.Quantize, kernels.Dequantize)

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
    geometry = rules.conv_geometry(call)
    if isinstance(geometry, Declined):
        return geometry
    if declined := _EXACT.declined(call, weight, bias):
        return declined
    _, padding, _, groups = geometry
    merged = _groups_to_merge(weight.values, groups, padding)
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
    if declined := _EXACT.declined(call, weight, bias):
        return declined
    return kernels.QLinear(weight, bias, call.inputs[0], call.output, _activation(call))


def max_pool2d(call: QuantizedCall) -> nn.Module | Declined:
    """A maximum over windows."""
    return kernels.QMaxPool2d(tuple(call.args[1:]))


def join(call: QuantizedCall) -> nn.Module | Declined:
    """A concatenation: of integers that mean the same as they are, of others in float."""
    return Declined("") if call.keeps_qparams else IN_FLOAT.kernel(call)


def mean(call: QuantizedCall) -> nn.Module | Declined:
    """A mean over given dimensions."""
    _, dims, keepdim = call.args
    if not dims:
        return Declined("it is over all elements")
    return elementwise.QMean(tuple(dims), keepdim, call.inputs[0], call.quantized_output)


def adaptive_avg_pool(call: QuantizedCall) -> nn.Module | Declined:
    """A mean over all places."""
    size = call.args[1]
    if any(length != 1 for length in size):
        return Declined("it is over parts of them")
    return elementwise.QMean(tuple(range(-len(size), 0)), True, call.inputs[0], call.quantized_output)


def _binary(kernel: type[nn.Module]) -> rules.Build:
    return lambda call: kernel(*call.inputs, call.quantized_output)


def _lookup(function: Callable[[Tensor], Tensor], name: str, input: QParams, output: QParams) -> nn.Module:
    return LookupKernel(function(torch.arange(256).to(torch.uint8)), name)


RULES: tuple[LoweringRule, ...] = (
    LoweringRule(op.LINEAR, _EXACT.dynamic_linear(kernels.QDynamicLinear), is_dynamic=True),
    LoweringRule((op.CONV[1], op.ADD), conv_add),
    *(LoweringRule(operator, conv) for operator in op.CONV),
    LoweringRule(op.LINEAR, linear),
    *(LoweringRule(fused, linear if fused[0] is op.LINEAR else conv) for fused in (*FUSED_ACTIVATIONS, *FUSED_FIXED)),
    IN_FLOAT.binary(op.ADD, _binary(elementwise.QAdd)),
    IN_FLOAT.binary(op.MUL, _binary(elementwise.QMul)),
    LoweringRule(op.MAX_POOL[1], max_pool2d),
    *(IN_FLOAT.unless(operator, adaptive_avg_pool) for operator in op.ADAPTIVE_AVG_POOL),
    IN_FLOAT.unless(op.MEAN, mean),
    LoweringRule(op.CLAMP, rules.clamp),
    IN_FLOAT.unless(op.INTERPOLATE, rules.nearest),
    LoweringRule(op.PAD, rules.pad, takes_computed=True),
    *(LoweringRule(operator, join, takes_computed=True) for operator in (op.CAT, op.STACK)),
    # In float these take three times as long as by table; what is left in float below, no longer.
    *(
        IN_FLOAT.by_table(operator, _lookup)
        for operator in (op.SIGMOID, op.HARDSIGMOID, op.TANH, op.ELU, op.SILU, op.GELU)
    ),
    *(
        IN_FLOAT.rule(operator)
        for operator in (
            *op.AVG_POOL, op.HARDSWISH, op.SOFTMAX, op.LEAKY_RELU, op.MAX_POOL[0], op.MAX_POOL[2],
        )
    ),
)  # fmt: skip
