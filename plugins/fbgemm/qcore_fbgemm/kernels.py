"""The one room that knows torch's quantized tensors and the FBGEMM engine.

Between kernels, values are quantized tensors, so that a chain stays in one family. The engine matters only while
weights are packed: a packed weight remembers its engine, and of the other operators only those are used, and in those
forms, that give the same bits whatever engine the process is set to.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from qcore_torch_kernels.broadcast import factors
from qcore_torch_kernels.kernel import KernelModule, WeightKernel, with_batch
from qcore_torch_kernels.sums import check_sums
from torch import Tensor

from qcore.errors import BackendUnavailableError, ShapeError
from qcore.lowering import QParams, QuantizedWeight
from qcore_fbgemm.observers import is_depthwise, largest_sum

ENGINE = "fbgemm"
_LIBRARY = torch.ops.quantized
#: The dynamic kernel never takes steps below 2**-14, in which small inputs are lost; so inputs come to it enlarged by
#: this, and weights as much smaller. By a power of two no bit of a result changes.
DYNAMIC_UNIT = 2.0**40
_DTYPE = torch.quint8


def supported_engines() -> list[str]:
    """The engines that this torch offers on this machine."""
    return [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


def has_vnni() -> bool:
    """Whether the CPU has AVX-512 VNNI, the only form of it that FBGEMM uses."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def check_pairs(weight: Tensor, largest: int, input_max: int) -> None:
    """Refuse a weight that was loaded into a kernel, where a rule would have declined it.

    Args:
        weight: int8.
        largest: what two weights whose products are added in 16 bits add up to at most.
        input_max: the largest integer that the activation takes.

    Raises:
        BackendUnavailableError: such a sum could saturate on this CPU.
    """
    if (is_depthwise(weight) or not has_vnni()) and largest * input_max > 2**15 - 1:
        raise BackendUnavailableError(
            f"a weight of shape {tuple(weight.shape)} was loaded whose sums could saturate in 16 bits on this CPU; "
            "convert the model that it comes from here, or load it into a reference model"
        )


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
        return _bounded(lambda x: quantize(x, scale, zero_point, _DTYPE), self.bounds("output"))


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


class _Weighted(KernelModule):
    """What convolution and linear kernels have in common: the state.

    Args:
        weight: int8, symmetric.
        bias: float32.
        output: qparams of the result.
        input_max: the largest integer that the activation takes; ``None``: whatever is loaded is taken.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    out_axis = 0

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, output: QParams, input_max: int | None = None
    ) -> None:
        super().__init__()
        self.input_max = input_max
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

    def largest_sum(self) -> int:
        """What two weights whose products are added in 16 bits add up to at most."""
        return largest_sum(self.weight)

    def check_state(self) -> None:
        """A weight may be loaded that no rule has seen."""
        check_sums(self.weight, axis=self.out_axis)
        if self.input_max is not None:
            check_pairs(self.weight, self.largest_sum(), self.input_max)

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
        input_max: int | None = None,
    ) -> None:
        super().__init__(weight, bias, output, input_max)
        self.geometry = geometry

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"FBGEMM conv{self.weight.dim() - 2}d{self.relu}"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        dimensions = self.weight.dim() - 2
        geometry, extended = self._with_usual_padding()
        with _engine():
            prepack = getattr(_LIBRARY, f"conv{dimensions}d_prepack")
            packed = prepack(self.quantized_weight(), self.bias, *geometry)
        kernel = getattr(_LIBRARY, f"conv{dimensions}d{self.relu}")
        overload = kernel.default if dimensions == 1 else kernel.new
        scale, zero_point = self.qparams("output")

        def run(x: Tensor) -> Tensor:
            y: Tensor = overload(x, packed, scale, zero_point)
            return y

        batched = run if extended is None else _sliced(run, *extended)
        width = self.weight.shape[1] * self.geometry[3]
        return _bounded(with_batch(batched, dimensions + 2, width), self.cuts)

    def _with_usual_padding(self) -> tuple[tuple[Any, ...], tuple[list[int], list[int], list[int], list[int]] | None]:
        """A 2d depthwise convolution without padding, as one with half its kernel's size, of which a part is kept.

        FBGEMM's fast depthwise kernels know no other padding; the general one is some sixty times slower.

        Returns:
            The geometry, and for each dimension: rows to put before the input, results to drop at the start, kernel
            size and stride; ``None`` where nothing is to be done.
        """
        stride, padding, dilation, groups = self.geometry
        kernel = list(self.weight.shape[2:])
        is_depthwise = self.weight.shape[1] == 1 and groups == self.weight.shape[0]
        if not is_depthwise or kernel not in ([3, 3], [5, 5]) or any(padding) or max(dilation) > 1:
            return self.geometry, None
        half = [size // 2 for size in kernel]
        # The windows must begin where those of the unpadded convolution begin: at a multiple of the stride.
        before = [-pad % step for pad, step in zip(half, stride, strict=True)]
        dropped = [(pad + rows) // step for pad, rows, step in zip(half, before, stride, strict=True)]
        return (stride, half, dilation, groups), (before, dropped, kernel, list(stride))


class QConvTranspose(_Weighted):
    """A transposed convolution of 1, 2 or 3 dimensions, with one scale for its whole weight.

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
        input_max: int | None = None,
    ) -> None:
        super().__init__(weight, bias, output, input_max)
        self.geometry = geometry

    def largest_sum(self) -> int:
        """Which weights the kernel pairs isn't known."""
        return 2 * int(self.weight.to(torch.int32).abs().max())

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"FBGEMM conv_transpose{self.weight.dim() - 2}d"

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
        return f"FBGEMM linear{self.relu}"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        with _engine():
            packed = _LIBRARY.linear_prepack(self.quantized_weight(), self.bias)
        kernel = getattr(_LIBRARY, f"linear{self.relu}").default
        scale, zero_point = self.qparams("output")
        run = with_batch(lambda x: kernel(x, packed, scale, zero_point), 2, self.weight.shape[1])
        return _bounded(run, self.cuts)


class QLinearToFloat(WeightKernel):
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

    def check_state(self) -> None:
        """A weight may be loaded that no rule has seen."""
        super().check_state()
        check_pairs(self.weight, largest_sum(self.weight), self.input_max)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound; it quantizes what it reads, which gives the integers back."""
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        with _engine():
            weight = torch._make_per_channel_quantized_tensor(self.weight, self.weight_scale.double(), zero_points, 0)
            packed = _LIBRARY.linear_prepack(weight, self.bias)
        kernel = _LIBRARY.linear_with_input_q_dq_qweight_dq_output_fp32.default
        scale, zero_point = self.qparams("input")
        return with_batch(lambda x: kernel(x.dequantize(), scale, zero_point, packed), 2, self.weight.shape[1])


class QDynamicLinear(WeightKernel):
    """A linear layer from float to float, that takes the range of each input as it comes.

    Args:
        weight: int8, symmetric.
        bias: float32.
    """

    kernel_name = "FBGEMM linear, range at run time"
    takes_float = True

    def check_state(self) -> None:
        """A weight may be loaded that no rule has seen."""
        super().check_state()
        check_pairs(self.weight, largest_sum(self.weight), 255)

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
            add(a, b, out)
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


def _sliced(
    run: Callable[[Tensor], Tensor], before: list[int], dropped: list[int], kernel: list[int], stride: list[int]
) -> Callable[[Tensor], Tensor]:
    """``run`` on an input with rows and columns put before it, and of its result the part that was wanted."""
    pad = QPad((before[1], 0, before[0], 0), "constant").pack() if any(before) else None

    def sliced(x: Tensor) -> Tensor:
        high, wide = ((x.shape[2 + n] - kernel[n]) // stride[n] + 1 for n in (0, 1))
        if high < 1 or wide < 1:  # With the padding that wasn't wanted, the kernel takes it.
            raise ShapeError(f"an input of the sizes {tuple(x.shape[2:])} is smaller than a kernel of {tuple(kernel)}")
        y = run(x if pad is None else pad(x))
        return y[:, :, dropped[0] : dropped[0] + high, dropped[1] : dropped[1] + wide]

    return sliced


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
