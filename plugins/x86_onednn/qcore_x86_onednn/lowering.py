"""Which kernel computes which operator: the table of rules, and the functions that read an operator's arguments."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import Declined, FloatKernel, LoweringRule, QuantizedCall
from qcore_x86_onednn import kernels
from qcore_x86_onednn.observers import largest_sum

_Activation = tuple[str, list[float], str]
_NONE: _Activation = ("none", [], "")

#: Activations that a kernel computes itself, by operator; the function gets the activation's node's arguments.
_ACTIVATIONS: dict[Operator, Callable[[tuple[Any, ...]], _Activation]] = {
    op.HARDSWISH: lambda args: ("hardswish", [], ""),
    op.SILU: lambda args: ("swish", [], ""),
    op.GELU: lambda args: ("gelu", [], "none"),
    op.LEAKY_RELU: lambda args: ("leaky_relu", [float(args[1])], ""),
    op.TANH: lambda args: ("tanh", [], ""),
}


def _activation(call: QuantizedCall) -> _Activation:
    if len(call.nodes) == 1:
        return _NONE
    found = op.operator_of(call.nodes[-1])
    return _NONE if found is None or found not in _ACTIVATIONS else _ACTIVATIONS[found](call.nodes[-1].args)


def _saturates(call: QuantizedCall, weight: Tensor, is_depthwise: bool) -> bool:
    """Whether a pair of products could overflow 16 bits on this CPU."""
    if kernels.has_vnni() or is_depthwise:
        return False
    return largest_sum(weight) * call.inputs[0].quant_max > 2**15 - 1


_SATURATES = Declined("weights could saturate in 16 bits on this CPU; use a PerChannelMinMaxObserver for them")


def _conv_arguments(call: QuantizedCall) -> tuple[Any, ...] | Declined:
    weight = call.weight
    assert weight is not None
    _, _, _, stride, padding, dilation, groups = call.args
    kernel = weight.values.shape[2:]
    padding = _int_padding(padding, kernel, dilation)
    if padding is None:
        return Declined("padding 'same' isn't symmetric here")
    is_depthwise = weight.values.shape[1] == 1 and groups > 1 and len(kernel) < 3
    if _saturates(call, weight.values, is_depthwise):
        return _SATURATES
    geometry = (list(stride), list(padding), list(dilation), groups)
    return weight, call.bias, call.inputs[0], call.output, _activation(call), geometry


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
    assert call.weight is not None
    if _saturates(call, call.weight.values, False):
        return _SATURATES
    return kernels.QLinear(call.weight, call.bias, call.inputs[0], call.output, _activation(call))


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
    low, high = call.quantized_output.quant_min, call.quantized_output.quant_max
    cuts = [None if bound is None else call.quantized_output.quantize(float(bound)) for bound in call.args[1:3]]
    return kernels.QClamp(low if cuts[0] is None else cuts[0], high if cuts[1] is None else cuts[1])


def _in_float(operator: Operator) -> LoweringRule:
    return FloatKernel.rule(operator, kernels.Quantize, kernels.Dequantize)


RULES: tuple[LoweringRule, ...] = (
    LoweringRule((op.CONV[1], op.ADD), conv_add),
    *(LoweringRule(operator, conv) for operator in op.CONV),
    *(LoweringRule((op.CONV[1], activation), conv) for activation in (op.HARDSWISH, op.SILU)),
    LoweringRule(op.LINEAR, linear),
    *(LoweringRule((op.LINEAR, activation), linear) for activation in _ACTIVATIONS),
    LoweringRule(op.ADD, _binary(kernels.QAdd)),
    LoweringRule(op.MUL, _binary(kernels.QMul)),
    LoweringRule(op.MAX_POOL[1], max_pool2d),
    LoweringRule(op.CLAMP, clamp),
    *(
        _in_float(operator)
        for operator in (
            *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL, op.MEAN, op.HARDSWISH, op.HARDSIGMOID, op.SIGMOID, op.SOFTMAX, op.TANH,
            op.LEAKY_RELU, op.ELU, op.SILU, op.GELU, op.INTERPOLATE, op.CAT, op.STACK, op.MAX_POOL[0], op.MAX_POOL[2],
        )
    ),
)  # fmt: skip
