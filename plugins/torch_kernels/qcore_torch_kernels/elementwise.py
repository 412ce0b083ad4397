"""Into quantized tensors and out of them, sums and products, on torch's kernels that don't look at the engine."""

from collections.abc import Callable

import torch
from torch import Tensor

from qcore.lowering import QParams
from qcore_torch_kernels.broadcast import factors
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.lookup import LookupKernel
from qcore_torch_kernels.shells import DTYPE, as_plain, as_quantized, bounded


class ToOutput(KernelModule):
    """Base for kernels that only know the qparams of their result.

    Args:
        output: those.
    """

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)


class Quantize(ToOutput):
    """Float to quantized; arguments as those of :class:`ToOutput`."""

    kernel_name = "quantize"
    takes_float = True

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        (scale, zero_point), quantize = self.qparams("output"), torch.quantize_per_tensor
        return bounded(lambda x: quantize(x, scale, zero_point, DTYPE), self.bounds("output"))


class Dequantize(KernelModule):
    """Quantized to float.

    Args:
        input: the qparams; the tensor knows them itself.
    """

    kernel_name = "dequantize"

    def __init__(self, input: QParams) -> None:
        super().__init__()

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own."""
        return torch.dequantize


class QAdd(ToOutput):
    """A sum of two quantized tensors, of the same shape or broadcast; arguments as those of :class:`ToOutput`."""

    kernel_name = "quantized::add"

    @staticmethod
    def add(a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write the sum of two tensors of the same shape into ``out``, which is contiguous (images: channels_last)."""
        torch.ops.quantized.add.out(a, b, out)

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound."""
        add, output = self.add, self.qparams("output")
        return bounded(lambda a, b: sum_of(a, b, *output, add), self.bounds("output"))


def sum_of(
    a: Tensor, b: Tensor, scale: float, zero_point: int, add: Callable[[Tensor, Tensor, Tensor], None] = QAdd.add
) -> Tensor:
    """The sum of two quantized tensors, which is computed in float where they must be broadcast.

    Args:
        a: a tensor.
        b: another.
        scale: of the sum.
        zero_point: likewise.
        add: see :meth:`QAdd.add`.
    """
    if a.shape != b.shape:
        return torch.quantize_per_tensor(a.dequantize() + b.dequantize(), scale, zero_point, DTYPE)
    # The form with an output doesn't look at the engine.
    layout = torch.channels_last if a.dim() == 4 else torch.contiguous_format
    out = torch._empty_affine_quantized(a.shape, scale=scale, zero_point=zero_point, dtype=DTYPE, memory_format=layout)
    add(a, b, out)
    return out


class QMul(ToOutput):
    """A product of two quantized tensors, of the same shape or broadcast; arguments as those of :class:`ToOutput`."""

    kernel_name = "quantized::mul"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound."""
        output = self.qparams("output")
        return bounded(lambda a, b: product_of(a, b, *output), self.bounds("output"))


def product_of(a: Tensor, b: Tensor, scale: float, zero_point: int) -> Tensor:
    """The product of two quantized tensors that broadcast.

    Args:
        a: a tensor.
        b: another.
        scale: of the product.
        zero_point: likewise.
    """
    product: Tensor = torch.ops.quantized.mul.default(*factors(a, b), scale, zero_point)
    return product


class QLookup(LookupKernel):
    """Any function of single values of a quantized tensor, by a table of its results.

    Args:
        function: of quantized tensors, such as a :class:`~qcore_torch_kernels.float_kernel.FloatKernel`.
        name: of the function.
        input: qparams of the input.
        output: qparams of the result.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str, input: QParams, output: QParams) -> None:
        every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        table = function(as_quantized(every, input.scale, input.zero_point))
        super().__init__(as_plain(table).clone(), name)
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its tables bound."""
        run, output = super().pack(), self.qparams("output")
        return lambda x: as_quantized(run(as_plain(x)), *output)
