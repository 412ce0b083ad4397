"""Sums, products and means of activations, on torch's quantized kernels; in float where torch has none."""

import math
from collections.abc import Callable

import torch
from qcore_torch_kernels.kernel import KernelModule
from torch import Tensor

from qcore.lowering import QParams
from qcore_x86_onednn import kernels
from qcore_x86_onednn.integers import bounded


class _Binary(KernelModule):
    """Two integer inputs, one integer output.

    Args:
        first: qparams of the first input.
        second: qparams of the second input.
        output: qparams of the result.
    """

    def __init__(self, first: QParams, second: QParams, output: QParams) -> None:
        super().__init__()
        for name, qparams in (("first", first), ("second", second), ("output", output)):
            self.add_qparams(name, qparams)

    def in_float(self, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The computation without quantized kernels."""
        first, second, output = self.qparams("first"), self.qparams("second"), self.qparams("output")

        def run(a: Tensor, b: Tensor) -> Tensor:
            return kernels.quantize(function(kernels.dequantize(a, *first), kernels.dequantize(b, *second)), *output)

        return bounded(run, self.bounds("output"))


class QAdd(_Binary):
    """A sum of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::add"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound; not ``onednn::qadd``, which is slower and wrong for mixed layouts."""
        in_float = self.in_float(torch.add)
        if not kernels.has_quantized():
            return in_float
        qparams = self.qparams("first"), self.qparams("second"), self.qparams("output")

        def run(a: Tensor, b: Tensor) -> Tensor:
            return kernels.add(a, b, *qparams) if a.shape == b.shape else in_float(a, b)

        return bounded(run, self.bounds("output"))


class QMul(_Binary):
    """A product of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::mul"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound."""
        if not kernels.has_quantized():
            return self.in_float(torch.mul)
        first, second, output = self.qparams("first"), self.qparams("second"), self.qparams("output")
        return bounded(lambda a, b: kernels.mul(a, b, first, second, output), self.bounds("output"))


class QMean(KernelModule):
    """A mean over some dimensions. It is the sum that is rounded, once, to the mean's scale times their size.

    Args:
        dims: the dimensions.
        keepdim: whether they stay, with a size of 1.
        input: qparams of the input.
        output: qparams of the result.
    """

    kernel_name = "mean as a sum in float"

    def __init__(self, dims: tuple[int, ...], keepdim: bool, input: QParams, output: QParams) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim
        self.add_qparams("input", input)
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        dims, keepdim = self.dims, self.keepdim
        input, (scale, zero_point) = self.qparams("input"), self.qparams("output")

        def run(x: Tensor) -> Tensor:
            size = max(1, math.prod(x.shape[dim] for dim in dims))
            return kernels.quantize(kernels.dequantize(x, *input).sum(dims, keepdim), scale * size, zero_point)

        return bounded(run, self.bounds("output"))
