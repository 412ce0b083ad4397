"""Sums, products and means of activations, on torch's quantized kernels; in float where torch has none."""

import math
from collections.abc import Callable

import torch
from qcore_torch_kernels import shells
from qcore_torch_kernels.elementwise import product_of, sum_of
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.shells import as_plain, as_quantized, bounded
from torch import Tensor

from qcore.lowering import QParams
from qcore_x86_onednn import kernels


class _Binary(KernelModule):
    """Two integer inputs, one integer output.

    Args:
        first: qparams of the first input.
        second: qparams of the second input.
        output: qparams of the result.

    Attributes:
        function: in float.
        of_quantized: of two quantized tensors, and scale and zero point of the result.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    of_quantized: Callable[[Tensor, Tensor, float, int], Tensor]

    def __init__(self, first: QParams, second: QParams, output: QParams) -> None:
        super().__init__()
        for name, qparams in (("first", first), ("second", second), ("output", output)):
            self.add_qparams(name, qparams)

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The function with its constants bound."""
        first, second, output = self.qparams("first"), self.qparams("second"), self.qparams("output")
        function, of_quantized = self.function, self.of_quantized

        def run(a: Tensor, b: Tensor) -> Tensor:
            if not shells.HAS_QUANTIZED:
                result = function(kernels.dequantize(a, *first), kernels.dequantize(b, *second))
                return kernels.quantize(result, *output)
            return as_plain(of_quantized(as_quantized(a, *first), as_quantized(b, *second), *output))

        return bounded(run, self.bounds("output"))


class QAdd(_Binary):
    """A sum of two activations, of the same shape or broadcast.

    Not ``onednn::qadd``, which is slower and wrong for mixed layouts.
    """

    kernel_name = "quantized::add"
    function, of_quantized = staticmethod(torch.add), staticmethod(sum_of)


class QMul(_Binary):
    """A product of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::mul"
    function, of_quantized = staticmethod(torch.mul), staticmethod(product_of)


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
