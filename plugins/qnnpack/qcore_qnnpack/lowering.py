"""Which kernel computes which operator: the table of rules."""

from dataclasses import replace

from qcore_torch_kernels import rules
from qcore_torch_kernels.sums import coarsened
from torch import nn

from qcore.fx import operators as op
from qcore.lowering import Declined, LoweringRule, QuantizedCall
from qcore_qnnpack import kernels

_EXACT = rules.Exact(adds_bias=True)
IN_FLOAT = rules.InFloat(kernels.Quantize, kernels.Dequantize)


def _with_room_for_the_bias(build: rules.Build) -> rules.Build:
    def with_room(call: QuantizedCall) -> nn.Module | Declined:
        weight = coarsened(call.weight, call.bias, call.inputs[0], call.quantized_output)
        return build(replace(call, weights=(weight,)))

    return with_room


def global_avg_pool(call: QuantizedCall) -> nn.Module | Declined:
    """An average over whole images."""
    is_global = call.args[1] in (1, (1, 1), [1, 1])
    return kernels.QGlobalAvgPool(call.quantized_output) if is_global else Declined("it is over parts of them")


RULES: tuple[LoweringRule, ...] = (
    LoweringRule(op.LINEAR, _EXACT.dynamic_linear(kernels.QDynamicLinear), is_dynamic=True),
    LoweringRule(op.LINEAR, _with_room_for_the_bias(_EXACT.linear(kernels.QLinear))),
    *(LoweringRule(operator, _with_room_for_the_bias(_EXACT.conv(kernels.QConv))) for operator in op.CONV),
    *(LoweringRule(operator, _EXACT.conv_transpose(kernels.QConvTranspose)) for operator in op.CONV_TRANSPOSE[:2]),
    *rules.on_quantized_tensors(IN_FLOAT, kernels.QAdd),
    *map(IN_FLOAT.rule, op.ADAPTIVE_AVG_POOL[::2]),
    IN_FLOAT.unless(op.ADAPTIVE_AVG_POOL[1], global_avg_pool),
    *(
        IN_FLOAT.by_table(operator, kernels.QLookup)
        for operator in (op.HARDSWISH, op.HARDSIGMOID, op.SIGMOID, op.TANH, op.LEAKY_RELU, op.ELU)
    ),
)
