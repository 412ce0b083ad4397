"""Which kernel computes which operator: the table of rules."""

from typing import Any

from qcore_torch_kernels import elementwise, rules
from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.lowering import Declined, LoweringRule, QuantizedCall
from qcore_fbgemm import kernels

_EXACT, _EXACT_TRANSPOSED = rules.Exact(kernels.saturates), rules.Exact(kernels.any_pair_saturates)
IN_FLOAT = rules.InFloat(elementwise.Quantize, elementwise.Dequantize)


def conv_transpose(call: QuantizedCall) -> nn.Module | Declined:
    """A transposed convolution."""
    if _takes_the_direct_kernel(call.weight.values, rules.transposed_geometry(call)):
        return Declined("FBGEMM's kernel for this form is wrong")
    return _EXACT_TRANSPOSED.conv_transpose(kernels.QConvTranspose)(call)


def _takes_the_direct_kernel(weight: Tensor, geometry: Any) -> bool:
    """Whether FBGEMM would take its direct kernel for a transposed convolution, which reads memory that nobody wrote.

    Found by experiment: of 2 rows and up to 6 columns, with steps of up to 2, and whole octets of channels. Wider
    kernels and steps are left out, too, for what lies behind a bound may change. With any padding it isn't taken.
    """
    _, padding, _, dilation, groups = geometry
    is_plain = groups == 1 and not any(padding) and max(dilation) == 1
    return weight.dim() == 4 and weight.shape[2] == 2 and is_plain and not any(n % 8 for n in weight.shape[:2])


RULES: tuple[LoweringRule, ...] = (
    LoweringRule(op.LINEAR, _EXACT.dynamic_linear(kernels.QDynamicLinear), is_dynamic=True),
    LoweringRule(op.LINEAR, _EXACT.linear(kernels.linear)),
    *(LoweringRule(operator, _EXACT.conv(kernels.QConv)) for operator in op.CONV),
    *(LoweringRule(operator, conv_transpose) for operator in op.CONV_TRANSPOSE),
    *rules.on_quantized_tensors(IN_FLOAT),
    *(
        IN_FLOAT.rule(operator)
        for operator in (
            *op.ADAPTIVE_AVG_POOL, op.HARDSWISH, op.HARDSIGMOID, op.SIGMOID, op.TANH, op.LEAKY_RELU, op.ELU,
        )
    ),
)  # fmt: skip
