"""QNNPACK's kernels: those of the library on this engine, with what is QNNPACK's own.

Between kernels, values are quantized tensors, so that a chain stays in one family.
"""

from collections.abc import Callable, Iterator

import torch
from qcore_torch_kernels import elementwise, weighted
from qcore_torch_kernels.shells import as_plain, as_quantized
from torch import Tensor, nn

from qcore.errors import ShapeError
from qcore.lowering import QParams

ENGINE = "qnnpack"
#: Elements that are worked on in the calling thread; from 2**15 on torch uses its thread pool. QNNPACK has a pool of
#: its own. The threads of torch's go on spinning for milliseconds after they have worked, and take the processors from
#: QNNPACK's: between two convolutions that costs far more than one thread needs for what lies between them.
PIECE = 2**15 - 64
#: Float32 numbers of this size are whole, so adding it rounds, ties to even; torch's own round starts threads.
_ROUNDING = 1.5 * 2**23


class Quantize(elementwise.Quantize):
    """Float to quantized, in the calling thread; torch's own operator starts others for any size."""

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        whole, (scale, zero_point) = super().pack(), self.qparams("output")
        steps = float(1.0 / torch.tensor(scale, dtype=torch.float32))
        low, high = self.bounds("output") or (0, 255)

        def run(x: Tensor) -> Tensor:
            if _layout(x) is None:
                return whole(x)
            integers = torch.empty_like(x, dtype=torch.uint8)
            for piece, out in _pieces(x, integers):
                within = (piece * steps).nan_to_num_(0.0).clamp_(low - zero_point, high - zero_point)
                out.copy_(within.add_(_ROUNDING).sub_(_ROUNDING - zero_point))
            return as_quantized(integers, scale, zero_point)

        return run


class Dequantize(elementwise.Dequantize):
    """Quantized to float."""

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own, and for few elements what stays in the calling thread."""

        def run(x: Tensor) -> Tensor:
            if x.numel() > PIECE:
                return x.dequantize()
            return x.int_repr().to(torch.float32).sub_(x.q_zero_point()).mul_(x.q_scale())

        return run


class _OnQnnpack(weighted.EngineKernel):
    engine = ENGINE
    needs_normal_scale = True


class QConv(_OnQnnpack, weighted.QConv):
    """A convolution."""

    def around(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``run`` on images in the layout that it reads."""
        return lambda x: run(_channels_last(x))


class QConvTranspose(_OnQnnpack, weighted.QConvTranspose):
    """A transposed convolution of 1 or 2 dimensions."""


class QLinear(_OnQnnpack, weighted.QLinear):
    """A linear layer."""


class QDynamicLinear(_OnQnnpack, weighted.QDynamicLinear):
    """A linear layer that takes the range of each input as it comes."""


class QAdd(elementwise.QAdd):
    """A sum of two activations, in the calling thread."""

    @staticmethod
    def add(a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write the sum of two tensors of the same shape into ``out``."""
        one_layout = _layout(a) == _layout(b) == _layout(out)
        for x, y, z in _pieces(a, b, out) if one_layout else ((a, b, out),):
            elementwise.QAdd.add(x, y, z)


class QGlobalAvgPool(nn.Module):
    """The mean over height and width, from the integers' sums, which are exact.

    Args:
        output: qparams of the result.
    """

    kernel_name = "mean of integers"
    replayable = True

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.enter = Quantize(output)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels, height, width) to (..., channels, 1, 1)."""
        area = x.shape[-2] * x.shape[-1]
        if area == 0:
            raise ShapeError(f"expected images with pixels, found a tensor of shape {tuple(x.shape)}")
        pieces = _groups_of_channels(as_plain(x if x.dim() == 4 else x.unsqueeze(0)))
        sums = torch.cat([piece.sum((2, 3), dtype=torch.int32).flatten() for piece in pieces])
        means = sums.to(torch.float32).sub_(x.q_zero_point() * area).mul_(x.q_scale() / area)
        quantized: Tensor = self.enter(means.reshape(*x.shape[:-2], 1, 1))
        return quantized


class QLookup(elementwise.QLookup):
    """Any function of single values by a table, in the calling thread."""

    piece = PIECE


def _layout(x: Tensor) -> torch.memory_format | None:
    """How the elements of a tensor lie in memory, if they lie there without gaps."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape and one layout without gaps, side by side in pieces for the calling thread."""
    number = tensors[0].numel()
    # Without a place in memory among the numbers: a recorded call must hold for inputs that lie elsewhere.
    rows = [x.as_strided((number,), (1,)) for x in tensors]
    for start in range(0, number, PIECE):
        length = min(PIECE, number - start)
        yield tuple(row.narrow(0, start, length) for row in rows)


def _channels_last(x: Tensor) -> Tensor:
    """Images in the layout that convolutions read, rearranged in the calling thread if they have another."""
    if x.dim() != 4 or x.is_contiguous(memory_format=torch.channels_last):
        return x
    plain = as_plain(x)
    out = torch.empty(x.shape, dtype=torch.uint8, memory_format=torch.channels_last)
    rows = max(1, PIECE // max(1, x.shape[1] * x.shape[3]))
    for image in range(x.shape[0]):
        for start in range(0, x.shape[2], rows):
            part = (slice(image, image + 1), slice(None), slice(start, start + rows))
            out[part].copy_(plain[part])
    return as_quantized(out, x.q_scale(), x.q_zero_point())


def _groups_of_channels(x: Tensor) -> Iterator[Tensor]:
    """Images and groups of their channels that stay in the calling thread; all at once where those would be many."""
    images, channels, height, width = x.shape
    size = PIECE // (height * width)
    if size < 64 or images == 0:
        yield x
        return
    for image in range(images):
        for start in range(0, channels, size):
            yield x[image : image + 1, start : start + size]
