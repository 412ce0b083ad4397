"""Rules for a backend's table: functions that read an operator's arguments and build its kernel, or decline.

A rule is a function of the :class:`~qcore.lowering.QuantizedCall`. What differs from backend to backend is an argument
of the functions here: the kernel classes, and what makes a weight's sums inexact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcore.fx import operators as op
from qcore.fx.operators import Operator
from qcore.lowering import BoundaryBuilder, Declined, LoweringRule, QuantizedCall, QuantizedWeight
from qcore_torch_kernels.elementwise import QAdd, QMul
from qcore_torch_kernels.float_kernel import FloatKernel
from qcore_torch_kernels.integers import QClamp, QJoin, QNearest, QPad
from qcore_torch_kernels.pair_limited import SATURATES
from qcore_torch_kernels.sums import why_inexact
from qcore_torch_kernels.weighted import DYNAMIC_UNIT, Geometry, TransposedGeometry

Build = Callable[[QuantizedCall], "nn.Module | Declined"]

_ASYMMETRIC = Declined("padding 'same' isn't symmetric here")


def padding_of(padding: Any, kernel: Any, dilation: Any) -> list[int] | None:
    """A convolution's padding as numbers; ``None`` if it isn't the same on both sides.

    Args:
        padding: numbers, ``"valid"`` or ``"same"``.
        kernel: the kernel's sizes.
        dilation: a number for each of them.
    """
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return [number // 2 for number in total] if all(number % 2 == 0 for number in total) else None
    return list(padding)


def conv_geometry(call: QuantizedCall) -> Geometry | Declined:
    """The geometry of a convolution."""
    _, _, _, stride, padding, dilation, groups = call.args
    numbers = padding_of(padding, call.weight.values.shape[2:], dilation)
    return _ASYMMETRIC if numbers is None else (list(stride), numbers, list(dilation), groups)


def transposed_geometry(call: QuantizedCall) -> TransposedGeometry:
    """The geometry of a transposed convolution."""
    _, _, _, stride, padding, output_padding, groups, dilation = call.args
    return list(stride), list(padding), list(output_padding), list(dilation), groups


@dataclass(frozen=True)
class Exact:
    """Whether a backend's kernels compute a weight's sums exactly.

    Attributes:
        saturates: whether sums of a weight's products could leave 16 bits, given the largest integer of the activation.
        adds_bias: see :func:`~qcore_torch_kernels.sums.why_inexact`.
        unit: by how much the dynamic kernels' weights are smaller than they are said to be.
    """

    saturates: Callable[[Tensor, int], bool] = lambda weight, input_max: False
    adds_bias: bool = False
    unit: float = DYNAMIC_UNIT

    def declined(
        self,
        call: QuantizedCall,
        weight: QuantizedWeight | None = None,
        bias: Tensor | None = None,
        axis: int = 0,
    ) -> Declined | None:
        """Why the kernel would compute something wrong, if it would.

        Args:
            call: of an operator with a weight.
            weight: in the place of the call's, together with ``bias``.
            bias: see there.
            axis: of the weight's output channels.
        """
        if weight is None:
            weight, bias = call.weight, call.bias
        input = call.inputs[0] if call.inputs else None
        scaled = weight if input is not None else replace(weight, scale=weight.scale / self.unit)
        reason = why_inexact(scaled, bias, input, call.output, axis=axis, adds_bias=self.adds_bias)
        if reason is not None:
            return Declined(reason)
        input_max = 255 if input is None else input.quant_max
        return SATURATES if self.saturates(weight.values, input_max) else None

    def conv(self, kernel: Callable[..., nn.Module]) -> Build:
        """Convolutions.

        Args:
            kernel: takes weight, bias, output, geometry and input.
        """

        def build(call: QuantizedCall) -> nn.Module | Declined:
            geometry = conv_geometry(call)
            if isinstance(geometry, Declined):
                return geometry
            built = call.weight, call.bias, call.quantized_output, geometry, call.inputs[0]
            return self.declined(call) or kernel(*built)

        return build

    def conv_transpose(self, kernel: Callable[..., nn.Module]) -> Build:
        """Transposed convolutions; arguments as of :meth:`conv`."""

        def build(call: QuantizedCall) -> nn.Module | Declined:
            built = call.weight, call.bias, call.quantized_output, transposed_geometry(call), call.inputs[0]
            return self.declined(call, axis=1) or kernel(*built)

        return build

    def linear(self, kernel: Callable[..., nn.Module]) -> Build:
        """Linear layers.

        Args:
            kernel: takes weight, bias, output and input.
        """

        def build(call: QuantizedCall) -> nn.Module | Declined:
            return self.declined(call) or kernel(call.weight, call.bias, call.output, call.inputs[0])

        return build

    def dynamic_linear(self, kernel: Callable[..., nn.Module]) -> Build:
        """Linear layers that take their input's range at run time.

        Args:
            kernel: takes weight and bias.
        """

        def build(call: QuantizedCall) -> nn.Module | Declined:
            if call.dynamic != (0, 255):
                return Declined(f"the kernel rounds to 0..255, not to {call.dynamic}")
            return self.declined(call) or kernel(call.weight, call.bias)

        return build


def clamp(call: QuantizedCall) -> nn.Module | Declined:
    """A clamp that no quantize absorbed; input and output have the same qparams."""
    return QClamp(call.quantized_output.clamped(*call.args[1:3]))


def pad(call: QuantizedCall) -> nn.Module | Declined:
    """Padding."""
    return QPad(call.inputs[0], call.args[1], call.args[2], call.computed)


@dataclass(frozen=True)
class InFloat:
    """Rules for what is computed in float within one kernel, and for what need not be.

    Attributes:
        enter: makes the backend's tensor from a float tensor.
        leave: goes back.
    """

    enter: BoundaryBuilder
    leave: BoundaryBuilder

    def kernel(self, call: QuantizedCall) -> nn.Module | Declined:
        """Any operator."""
        return FloatKernel(call, self.enter, self.leave)

    def rule(self, operator: Operator) -> LoweringRule:
        """The rule that computes ``operator`` this way."""
        return LoweringRule(operator, self.kernel, takes_computed=True)

    def unless(self, operator: Operator, build: Build) -> LoweringRule:
        """The rule that takes another kernel for ``operator`` where there is one.

        Args:
            operator: is computed in float where ``build`` declines, or an argument is computed in the graph.
            build: the rule for the kernel.
        """

        def choose(call: QuantizedCall) -> nn.Module | Declined:
            built = Declined("") if call.computed else build(call)
            return self.kernel(call) if isinstance(built, Declined) else built

        return LoweringRule(operator, choose, takes_computed=True)

    def binary(self, operator: Operator, kernel: Build) -> LoweringRule:
        """The rule for a function of two activations; of an activation and a number it is computed in float.

        Args:
            operator: the function.
            kernel: of two activations.
        """
        return LoweringRule(operator, lambda call: kernel(call) if len(call.inputs) == 2 else self.kernel(call))

    def by_table(self, operator: Operator, lookup: Callable[..., nn.Module]) -> LoweringRule:
        """The rule for a function of single values, by a table of what it gives in float.

        Args:
            operator: the function.
            lookup: takes the kernel that computes in float, the operator's name, input and output.
        """

        def build(call: QuantizedCall) -> nn.Module | Declined:
            return lookup(self.kernel(call), operator.name, call.inputs[0], call.quantized_output)

        return LoweringRule(operator, build)


def join(call: QuantizedCall) -> nn.Module | Declined:
    """A concatenation or a stack of integers that mean the same."""
    if not call.keeps_qparams:
        return Declined("its inputs' integers mean other numbers than its result's")
    function = torch.stack if op.operator_of(call.nodes[0]) is op.STACK else torch.cat
    return QJoin(function, call.args[1], call.quantized_output)


def nearest(call: QuantizedCall) -> nn.Module | Declined:
    """Interpolation that only repeats or drops elements."""
    _, size, scale_factor, mode, _ = call.args
    if not call.keeps_qparams or mode not in ("nearest", "nearest-exact"):
        return Declined("it computes means")
    return QNearest(size, scale_factor, mode)


def on_quantized_tensors(in_float: InFloat, add: type[QAdd] = QAdd) -> list[LoweringRule]:
    """The rules for operators without weights that every backend on quantized tensors has.

    Args:
        in_float: of the backend.
        add: the kernel for sums.
    """
    return [
        in_float.binary(op.ADD, lambda call: add(call.quantized_output)),
        in_float.binary(op.MUL, lambda call: QMul(call.quantized_output)),
        LoweringRule(op.CLAMP, clamp),
        LoweringRule(op.PAD, pad, takes_computed=True),
        in_float.unless(op.CAT, join),
        in_float.unless(op.STACK, join),
        in_float.unless(op.INTERPOLATE, nearest),
        *map(in_float.rule, (*op.AVG_POOL, op.MEAN, op.MAX_POOL[2])),
    ]
