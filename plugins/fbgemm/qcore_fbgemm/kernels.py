"""FBGEMM's kernels: those of the library on this engine, with what is FBGEMM's own.

Between kernels, values are quantized tensors, so that a chain stays in one family.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from qcore_torch_kernels import weighted
from qcore_torch_kernels.engines import engine
from qcore_torch_kernels.kernel import with_batch
from qcore_torch_kernels.pair_limited import could_saturate, saturation_error
from qcore_torch_kernels.shells import as_plain, as_quantized, quantized_weight
from torch import Tensor

from qcore.errors import ShapeError
from qcore.lowering import QParams, QuantizedWeight
from qcore_fbgemm.observers import is_depthwise, largest_sum

ENGINE = "fbgemm"


def has_vnni() -> bool:
    """Whether the CPU has AVX-512 VNNI, the only form of it that FBGEMM uses."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def saturates(weight: Tensor, input_max: int) -> bool:
    """Whether a pair of products could leave 16 bits in a convolution or linear layer.

    Args:
        weight: int8.
        input_max: the largest integer that the activation takes.
    """
    return _adds_pairs(weight) and could_saturate(largest_sum(weight), input_max)


def any_pair_saturates(weight: Tensor, input_max: int) -> bool:
    """The same for transposed convolutions, of which isn't known which weights they pair."""
    return _adds_pairs(weight) and could_saturate(2 * int(weight.to(torch.int32).abs().max()), input_max)


def _adds_pairs(weight: Tensor) -> bool:
    return is_depthwise(weight) or not has_vnni()


class _OnFbgemm(weighted.EngineKernel):
    """What a loaded weight must keep to."""

    engine = ENGINE
    saturates = staticmethod(saturates)

    def check_state(self) -> None:
        """A weight may be loaded that no rule has seen.

        Raises:
            BackendUnavailableError: sums of pairs could saturate.
        """
        super().check_state()
        if self.saturates(self.weight, self.input_max):
            raise saturation_error(self.weight)


class QConv(_OnFbgemm, weighted.QConv):
    """A convolution, in the form in which FBGEMM is fast.

    Its fast depthwise kernels in two dimensions know no other padding than half their size; the general one is some
    sixty times slower. So a convolution without padding is computed as one with it, of which a part is kept.
    """

    @property
    def is_extended(self) -> bool:
        """Whether it is such a convolution."""
        _, padding, dilation, groups = self.geometry
        has_fast_kernel = list(self.weight.shape[1:]) in ([1, 3, 3], [1, 5, 5]) and groups == self.weight.shape[0]
        return has_fast_kernel and not any(padding) and max(dilation) == 1

    def packed_geometry(self) -> weighted.Geometry:
        """The geometry that the weight is packed for."""
        stride, padding, dilation, groups = self.geometry
        half = [size // 2 for size in self.weight.shape[2:]]
        return stride, half if self.is_extended else padding, dilation, groups

    def around(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``run`` on an input with rows and columns put before it, and of its result the part that was wanted."""
        if not self.is_extended:
            return run
        kernel, stride = list(self.weight.shape[2:]), self.geometry[0]
        half = [size // 2 for size in kernel]
        # The windows must begin where those of the unpadded convolution begin: at a multiple of the stride.
        before = [-pad % step for pad, step in zip(half, stride, strict=True)]
        first = [(pad + rows) // step for pad, rows, step in zip(half, before, stride, strict=True)]
        sizes = (before[1], 0, before[0], 0)

        def sliced(x: Tensor) -> Tensor:
            high, wide = ((x.shape[2 + n] - kernel[n]) // stride[n] + 1 for n in (0, 1))
            if high < 1 or wide < 1:  # With the padding that wasn't wanted, the kernel takes it.
                raise ShapeError(
                    f"an input of the sizes {tuple(x.shape[2:])} is smaller than a kernel of {tuple(kernel)}"
                )
            if any(sizes):
                scale, zero_point = x.q_scale(), x.q_zero_point()
                x = as_quantized(F.pad(as_plain(x), sizes, value=zero_point), scale, zero_point)
            return run(x)[:, :, first[0] : first[0] + high, first[1] : first[1] + wide]

        return sliced


class QConvTranspose(_OnFbgemm, weighted.QConvTranspose):
    """A transposed convolution."""

    saturates = staticmethod(any_pair_saturates)


class QLinear(_OnFbgemm, weighted.QLinear):
    """A linear layer."""


class QLinearToFloat(_OnFbgemm):
    """A linear layer from integers to float.

    Args:
        weight: int8, symmetric.
        bias: float32.
        input: qparams of the input.
    """

    kernel_name = "FBGEMM linear, to float"

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, input: QParams) -> None:
        super().__init__(weight, bias)
        self.add_qparams("input", input)
        self.input_max = input.quant_max

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound; it quantizes what it reads, which gives the integers back."""
        with engine(ENGINE):
            packed = weighted.operator("linear_prepack")(quantized_weight(self.weight, self.weight_scale), self.bias)
        kernel = weighted.operator("linear_with_input_q_dq_qweight_dq_output_fp32").default
        scale, zero_point = self.qparams("input")
        return with_batch(lambda x: kernel(x.dequantize(), scale, zero_point, packed), 2, self.weight.shape[1])


class QDynamicLinear(_OnFbgemm, weighted.QDynamicLinear):
    """A linear layer that takes the range of each input as it comes."""


def linear(weight: QuantizedWeight, bias: Tensor | None, output: QParams | None, input: QParams) -> _OnFbgemm:
    """A linear layer, to integers or to float."""
    return QLinearToFloat(weight, bias, input) if output is None else QLinear(weight, bias, output, input)
