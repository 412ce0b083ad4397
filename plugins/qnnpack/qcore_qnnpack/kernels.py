"""The one room that knows torch's quantized tensors and the QNNPACK engine.

Between kernels, values are quantized tensors, so that a chain stays in one family. The engine matters only while
weights are packed: a packed weight remembers its engine, and of the other operators only those are used, and in those
forms, that give the same bits whatever engine the process is set to.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from qcore_torch_kernels.broadcast import factors
from qcore_torch_kernels.kernel import KernelModule, WeightKernel, with_batch
from qcore_torch_kernels.lookup import LookupKernel
from qcore_torch_kernels.sums import check_sums
from torch import Tensor, nn

from qcore.errors import LoweringError, ShapeError
from qcore.lowering import QParams, QuantizedWeight

ENGINE = "qnnpack"
_LIBRARY = torch.ops.quantized
#: The dynamic kernel never takes steps below 2**-14, in which small inputs are lost; so inputs come to it enlarged by
#: this, and weights as much smaller. By a power of two no bit of a result changes.
DYNAMIC_UNIT = 2.0**40
_DTYPE = torch.quint8
#: Elements that are worked on in the calling thread; from 2**15 on torch uses its thread pool. QNNPACK has a pool of
#: its own. The threads of torch's go on spinning for milliseconds after they have worked, and take the processors from
#: QNNPACK's: between two convolutions that costs far more than one thread needs for what lies between them.
PIECE = 2**15 - 64
#: Float32 numbers of this size are whole, so adding it rounds, ties to even; torch's own round starts threads.
_ROUNDING = 1.5 * 2**23


def supported_engines() -> list[str]:
    """The engines that this torch offers on this machine."""
    return [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


TOO_SMALL = "the scales of its input and its weight have a product below float32's smallest normal number"


def is_too_small(input_scale: float, weight_scale: Tensor) -> bool:
    """Whether the scale of the sums leaves float32's normal numbers, among which the kernels compute it."""
    smallest = float(weight_scale.min()) if weight_scale.numel() else 1.0
    return input_scale * smallest < torch.finfo(torch.float32).tiny


@contextmanager
def _engine() -> Iterator[None]:
    """Pack weights for this engine: it is a setting of the process, and put back; ``packed`` lets one thread in."""
    with warnings.catch_warnings():
        # torch says that quantized dtypes are deprecated; users of qcore needn't hear it.
        warnings.simplefilter("ignore")
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


def _as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor on the storage of a plain one."""
    shell = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=_DTYPE)
    return shell.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _as_plain(x: Tensor) -> Tensor:
    """A plain tensor on the storage of a quantized one."""
    shell = torch.empty(0, dtype=torch.uint8)
    return shell.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


class Quantize(KernelModule):
    """Float to quantized.

    Args:
        output: the qparams.
    """

    kernel_name = "quantize"
    takes_float = True

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        scale, zero_point = self.qparams("output")
        quantize = torch.quantize_per_tensor
        with _engine():
            quantize(
                torch.zeros(1, dtype=torch.float32), scale, zero_point, _DTYPE
            )  # torch's one warning in a process.
        whole = _bounded(lambda x: quantize(x, scale, zero_point, _DTYPE), self.bounds("output"))
        steps = float(1.0 / torch.tensor(scale, dtype=torch.float32))
        low, high = self.bounds("output") or (0, 255)

        def run(x: Tensor) -> Tensor:
            if _layout(x) is None:
                return whole(x)
            # In the calling thread, where torch's own operator starts others for any size.
            integers = torch.empty_like(x, dtype=torch.uint8)
            for piece, out in _pieces(x, integers):
                within = (piece * steps).nan_to_num_(0.0).clamp_(low - zero_point, high - zero_point)
                out.copy_(within.add_(_ROUNDING).sub_(_ROUNDING - zero_point))
            return _as_quantized(integers, scale, zero_point)

        return run


class Dequantize(KernelModule):
    """Quantized to float.

    Args:
        input: the qparams; the tensor knows them itself.
    """

    kernel_name = "dequantize"

    def __init__(self, input: QParams) -> None:
        super().__init__()

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own, and for few elements what stays in the calling thread."""

        def run(x: Tensor) -> Tensor:
            if x.numel() > PIECE:
                return x.dequantize()
            return x.int_repr().to(torch.float32).sub_(x.q_zero_point()).mul_(x.q_scale())

        return run


class _Weighted(KernelModule):
    """What convolution and linear kernels have in common: the state.

    Args:
        weight: int8, symmetric.
        bias: float32.
        output: qparams of the result.
        input: qparams of the activation, to look at what is loaded; ``None``: whatever is loaded is taken.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    out_axis = 0

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, output: QParams, input: QParams | None = None
    ) -> None:
        super().__init__()
        self.has_input = input is not None
        if input is not None:
            self.add_qparams("input", input)
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale.to(torch.float32))
        self.register_buffer("bias", None if bias is None else bias.to(torch.float32))
        self.add_qparams("output", output)

    @property
    def relu(self) -> str:
        """How the kernel's name ends: a cut at zero and nowhere else is its own ReLU."""
        return "_relu" if self.bounds("output") == (self.qparams("output")[1], 255) else ""

    @property
    def cuts(self) -> tuple[int, int] | None:
        """The bounds that the kernel doesn't keep to by itself."""
        return None if self.relu else self.bounds("output")

    def check_state(self) -> None:
        """Refuse a state that was loaded, where a rule would have declined it.

        Raises:
            LoweringError: sums could leave 32 bits, or their scale is below float32's normal numbers.
        """
        check_sums(self.weight, axis=self.out_axis)
        if self.has_input and is_too_small(self.qparams("input")[0], self.weight_scale):
            raise LoweringError(
                f"scales were loaded that a kernel can't compute with: {TOO_SMALL}. Convert the model that they "
                "come from, or load them into a reference model"
            )

    def quantized_weight(self) -> Tensor:
        """The weight as the packing functions take it."""
        if self.weight_scale.dim() == 0:
            return torch._make_per_tensor_quantized_tensor(self.weight, float(self.weight_scale), 0)
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        return torch._make_per_channel_quantized_tensor(self.weight, self.weight_scale.double(), zero_points, 0)

    def extra_repr(self) -> str:
        """The weight's shape."""
        return f"weight={tuple(self.weight.shape)}"


class QConv(_Weighted):
    """A convolution of 1, 2 or 3 dimensions.

    Args:
        weight: int8, symmetric, (out, in / groups, ...).
        bias: float32.
        output: qparams of the result.
        geometry: stride, padding, dilation (one number for each dimension) and groups.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        output: QParams,
        geometry: tuple[list[int], list[int], list[int], int],
        input: QParams | None = None,
    ) -> None:
        super().__init__(weight, bias, output, input)
        self.geometry = geometry

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"QNNPACK conv{self.weight.dim() - 2}d{self.relu}"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        dimensions = self.weight.dim() - 2
        with _engine():
            prepack = getattr(_LIBRARY, f"conv{dimensions}d_prepack")
            packed = prepack(self.quantized_weight(), self.bias, *self.geometry)
        kernel = getattr(_LIBRARY, f"conv{dimensions}d{self.relu}")
        overload = kernel.default if dimensions == 1 else kernel.new
        scale, zero_point = self.qparams("output")
        width = self.weight.shape[1] * self.geometry[3]
        run = with_batch(lambda x: overload(_channels_last(x), packed, scale, zero_point), dimensions + 2, width)
        return _bounded(run, self.cuts)


class QConvTranspose(_Weighted):
    """A transposed convolution of 1 or 2 dimensions, with one scale for its whole weight.

    Args:
        weight: int8, symmetric, (in, out / groups, ...).
        bias: float32.
        output: qparams of the result.
        geometry: stride, padding, output padding (one number for each dimension), dilation and groups.
    """

    out_axis = 1

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        output: QParams,
        geometry: tuple[list[int], list[int], list[int], list[int], int],
        input: QParams | None = None,
    ) -> None:
        super().__init__(weight, bias, output, input)
        self.geometry = geometry

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"QNNPACK conv_transpose{self.weight.dim() - 2}d"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        dimensions = self.weight.dim() - 2
        with _engine():
            prepack = getattr(_LIBRARY, f"conv_transpose{dimensions}d_prepack")
            packed = prepack(self.quantized_weight(), self.bias, *self.geometry)
        kernel = getattr(_LIBRARY, f"conv_transpose{dimensions}d").default
        scale, zero_point = self.qparams("output")
        run = with_batch(lambda x: kernel(x, packed, scale, zero_point), dimensions + 2, self.weight.shape[0])
        return _bounded(run, self.bounds("output"))


class QLinear(_Weighted):
    """A linear layer on inputs of any number of leading dimensions."""

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"QNNPACK linear{self.relu}"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        with _engine():
            packed = _LIBRARY.linear_prepack(self.quantized_weight(), self.bias)
        kernel = getattr(_LIBRARY, f"linear{self.relu}").default
        scale, zero_point = self.qparams("output")
        run = with_batch(lambda x: kernel(x, packed, scale, zero_point), 2, self.weight.shape[1])
        return _bounded(run, self.cuts)


class QDynamicLinear(WeightKernel):
    """A linear layer from float to float, that takes the range of each input as it comes.

    Args:
        weight: int8, symmetric.
        bias: float32.
    """

    kernel_name = "QNNPACK linear, range at run time"
    takes_float = True

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        scales = self.weight_scale.double() / DYNAMIC_UNIT
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        with _engine():
            weight = torch._make_per_channel_quantized_tensor(self.weight, scales, zero_points, 0)
            packed = _LIBRARY.linear_prepack(weight, self.bias)
        kernel = _LIBRARY.linear_dynamic.default
        return with_batch(lambda x: kernel(x * DYNAMIC_UNIT, packed), 2, self.weight.shape[1])


class QAdd(KernelModule):
    """A sum of two activations, of the same shape or broadcast.

    Args:
        output: qparams of the result.
    """

    kernel_name = "quantized::add"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound; the form with an output doesn't look at the engine."""
        add, empty = _LIBRARY.add.out, torch._empty_affine_quantized
        scale, zero_point = self.qparams("output")

        def run(a: Tensor, b: Tensor) -> Tensor:
            if a.shape != b.shape:
                return torch.quantize_per_tensor(a.dequantize() + b.dequantize(), scale, zero_point, _DTYPE)
            layout = torch.channels_last if a.dim() == 4 else torch.contiguous_format
            out = empty(a.shape, scale=scale, zero_point=zero_point, dtype=_DTYPE, memory_format=layout)
            one_layout = all(x.is_contiguous(memory_format=layout) for x in (a, b))
            for x, y, z in _pieces(a, b, out) if one_layout else ((a, b, out),):
                add(x, y, z)
            return out

        return _bounded(run, self.bounds("output"))


class QMul(KernelModule):
    """A product of two activations, of the same shape or broadcast.

    Args:
        output: qparams of the result.
    """

    kernel_name = "quantized::mul"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound."""
        mul = _LIBRARY.mul.default
        scale, zero_point = self.qparams("output")

        def run(a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = mul(*factors(a, b), scale, zero_point)
            return y

        return _bounded(run, self.bounds("output"))


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
        pieces = _groups_of_channels(_as_plain(x if x.dim() == 4 else x.unsqueeze(0)))
        sums = torch.cat([piece.sum((2, 3), dtype=torch.int32).flatten() for piece in pieces])
        means = sums.to(torch.float32).sub_(x.q_zero_point() * area).mul_(x.q_scale() / area)
        quantized: Tensor = self.enter(means.reshape(*x.shape[:-2], 1, 1))
        return quantized


class QLookup(LookupKernel):
    """Any function of single values, by a table of its results.

    Args:
        function: of the backend's tensors, such as a :class:`~qcore.lowering.FloatKernel`.
        name: of the function.
        input: qparams of the input.
        output: qparams of the result.
    """

    piece = PIECE

    def __init__(self, function: Callable[[Tensor], Tensor], name: str, input: QParams, output: QParams) -> None:
        every = _as_quantized(torch.arange(256, dtype=torch.int32).to(torch.uint8), input.scale, input.zero_point)
        super().__init__(_as_plain(function(every)).clone(), name)
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its tables bound."""
        run, output = super().pack(), self.qparams("output")
        return lambda x: _as_quantized(run(_as_plain(x)), *output)


class QClamp(KernelModule):
    """A clamp on integers as they are.

    Args:
        output: qparams of input and result, with the bounds as their clamp.
    """

    kernel_name = "clamp on integers"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's clamp of quantized tensors depends on the engine, and is wrong for channels_last in one of them."""
        low, high = self.bounds("output") or (0, 255)
        return lambda x: _as_quantized(_as_plain(x).clamp(low, high), x.q_scale(), x.q_zero_point())


class QPad(KernelModule):
    """Padding, by zero or by the input's own values.

    Args:
        pad: as in ``F.pad``.
        mode: as in ``F.pad``.
    """

    kernel_name = "pad on integers"

    def __init__(self, pad: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.pad, self.mode = pad, mode

    def pack(self) -> Callable[[Tensor], Tensor]:
        """On the integers themselves, which is many times faster than torch's padding of quantized tensors."""
        pad, mode = self.pad, self.mode

        def run(x: Tensor) -> Tensor:
            zero_point = x.q_zero_point()
            # Only a constant may be given a value; elsewhere F.pad repeats what is there.
            padded = F.pad(_as_plain(x), pad, mode, zero_point if mode == "constant" else None)
            return _as_quantized(padded, x.q_scale(), zero_point)

        return run


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
    plain = _as_plain(x)
    out = torch.empty(x.shape, dtype=torch.uint8, memory_format=torch.channels_last)
    rows = max(1, PIECE // max(1, x.shape[1] * x.shape[3]))
    for image in range(x.shape[0]):
        for start in range(0, x.shape[2], rows):
            part = (slice(image, image + 1), slice(None), slice(start, start + rows))
            out[part].copy_(plain[part])
    return _as_quantized(out, x.q_scale(), x.q_zero_point())


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


def _bounded(run: Callable[..., Tensor], bounds: tuple[int, int] | None) -> Callable[..., Tensor]:
    if bounds is None:
        return run
    low, high = bounds

    def bounded(*inputs: Tensor) -> Tensor:
        y = run(*inputs)
        # On the memory of y itself, but returned as what the clamp gave: a compiler that sees only schemas doesn't know
        # that the two share it, and would drop a clamp whose result nobody reads.
        return _as_quantized(_as_plain(y).clamp_(low, high), y.q_scale(), y.q_zero_point())

    return bounded
