"""The one room that calls torch's native operators: oneDNN's on plain tensors, and some of torch's quantized ones.

Between kernels, values are plain tensors. A plain tensor and a quantized one share their storage (``as_quantized``,
``as_plain``), so nothing is copied between the two families, and a replayed chain of quantized kernels never leaves
theirs. Small calls of the quantized kernels take half the time: they keep what oneDNN prepares for them, which the
plain ones look for at each call. Where a torch no longer has the quantized ones, the plain ones, or float arithmetic,
take their place.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from qcore_torch_kernels import elementwise, pair_limited, shells
from qcore_torch_kernels.engines import engine, has_engine
from qcore_torch_kernels.kernel import KernelModule, WeightKernel, with_batch
from qcore_torch_kernels.shells import DTYPE, as_plain, as_quantized, bounded, quantized_weight
from torch import Tensor

from qcore import ops
from qcore.lowering import QParams, QuantizedWeight
from qcore_x86_onednn.by_shape import by_shape
from qcore_x86_onednn.engines import engine_of_conv, limits
from qcore_x86_onednn.integers import all_weights_127, is_exact_at_the_ends, merge_groups
from qcore_x86_onednn.observers import largest_sum
from qcore_x86_onednn.windows import Geometry, in_any_windows, rewriting

_ONEDNN = torch.ops.onednn
_QUANTIZED = torch.ops.quantized
_NEEDED = (
    "qconv1d_pointwise",
    "qconv2d_pointwise",
    "qconv3d_pointwise",
    "qconv_prepack",
    "qlinear_pointwise",
    "qlinear_prepack",
)


#: Stride, padding, dilation and groups of a convolution that says nothing of them.
_NO_GEOMETRY = ([1, 1], [0, 0], [1, 1], 1)


def missing_kernels() -> list[str]:
    """The names of needed operators that this torch doesn't have."""
    if not torch.backends.mkldnn.is_available():
        return ["oneDNN"]
    return [f"onednn::{name}" for name in _NEEDED if not hasattr(_ONEDNN, name)]


@functools.cache
def has_vnni() -> bool:
    """Whether the kernels add four products in 32 bits, so that nothing saturates."""
    capabilities = torch.cpu.get_capabilities()
    # What the CPU has, oneDNN need not use: ONEDNN_MAX_CPU_ISA forbids it, for one. So the kernels are asked, too.
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")) and not measure_saturation()


def measure_saturation() -> bool:
    """Whether oneDNN's kernels lose something at the ends of the ranges: all weights 127, all activations 255."""
    # The plain kernels: which of the others to take depends on the answer.
    linear, conv = all_weights_127([]), [all_weights_127([size, size]) for size in (1, 3)]
    runs = [QLinear(*linear)._run_of_plain(), *(QConv(*state, _NO_GEOMETRY)._run_of_plain() for state in conv)]
    return not all(map(is_exact_at_the_ends, runs, ([], [1, 1], [3, 3])))


@functools.cache
def is_exact(name: str) -> bool:
    """Whether an engine is there and its matrix products lose nothing.

    Without VNNI nothing is asked: there no weight comes to a kernel whose pairs could saturate.
    """
    if not has_engine(name):
        return False
    return not has_vnni() or is_exact_at_the_ends(QLinear(*all_weights_127([]))._run_of_engine(name), [])


def could_saturate(weight: Tensor, input_max: int) -> bool:
    """Whether a pair of products could overflow 16 bits on this CPU.

    Args:
        weight: int8, (out, in, ...).
        input_max: the largest integer that the activation takes.
    """
    return not has_vnni() and pair_limited.could_saturate(largest_sum(weight), input_max)


def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Float to uint8."""
    if not shells.HAS_QUANTIZED:
        arguments = torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point), 0, 255, torch.uint8
        return ops.quantize_per_tensor(x, *arguments)  # type: ignore[no-any-return]
    return as_plain(torch.quantize_per_tensor(x, scale, zero_point, DTYPE))


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """uint8 to float."""
    if not shells.HAS_QUANTIZED:
        return ops.dequantize_per_tensor(x, torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point))  # type: ignore[no-any-return]
    return as_quantized(x, scale, zero_point).dequantize()


class Quantize(elementwise.Quantize):
    """Float to uint8; arguments as those of the library's."""

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        (scale, zero_point), bounds = self.qparams("output"), self.bounds("output")
        if not has_engine("qnnpack"):
            return bounded(lambda x: quantize(x, scale, zero_point), bounds)

        def run(x: Tensor) -> Tensor:
            is_image = x.dim() == 4 and 2 <= x.shape[1] <= 4 and x.is_contiguous() and x.numel() > 0
            q = torch.quantize_per_tensor(x, scale, zero_point, DTYPE)
            return as_plain(_interleaved(q) if is_image else q)

        return bounded(run, bounds)


def _interleaved(q: Tensor) -> Tensor:
    """An image's planes in the layout that convolutions take, in a third of the time of a copy.

    To shuffle all bytes of an image as channels, in as many groups as it has planes, is to interleave the planes. The
    kernel is QNNPACK's, whichever engine is set.
    """
    batch, channels, height, width = q.shape
    row = torch.channel_shuffle(q.view(batch, channels * height * width, 1, 1), channels)
    return row.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Dequantize(KernelModule):
    """uint8 to float.

    Args:
        input: the qparams.
    """

    kernel_name = "dequantize"

    def __init__(self, input: QParams) -> None:
        super().__init__()
        self.add_qparams("input", input)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        input = self.qparams("input")
        return lambda x: dequantize(x, *input)


class _Weighted(WeightKernel):
    """What convolution and linear kernels have in common: the state.

    Args:
        weight: int8, symmetric.
        bias: float32.
        input: qparams of the activation.
        output: qparams of the result; ``None`` for float.
        given: oneDNN's name of the activation to compute in the kernel, its scalars and its algorithm.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        input: QParams,
        output: QParams | None,
        given: tuple[str, list[float], str],
    ) -> None:
        super().__init__(weight, bias)
        self.add_qparams("input", input)
        self.given = given
        self.input_max = input.quant_max
        self.gives_float = output is None
        if output is not None:
            self.add_qparams("output", output)

    @property
    def is_relu(self) -> bool:
        """Whether results are cut at zero and nowhere else, which the kernel does by itself."""
        if self.gives_float or not (self.is_bare and self.knows_relu):
            return False
        return self.bounds("output") == (self.qparams("output")[1], 255)

    @property
    def activation(self) -> tuple[str, list[float], str]:
        """The activation that the kernel computes, as it takes it."""
        return ("relu", [], "") if self.is_relu else self.given

    @property
    def cuts(self) -> tuple[int, int] | None:
        """The bounds that the kernel doesn't keep to by itself."""
        return None if self.gives_float or self.is_relu else self.bounds("output")

    def output_arguments(self) -> tuple[float, int, torch.dtype]:
        """Scale, zero point and dtype of the result, as the kernels take them."""
        return (1.0, 0, torch.float32) if self.gives_float else (*self.qparams("output"), torch.uint8)

    def kernel_weight(self) -> Tensor:
        """The weight in the form in which the kernel gets it."""
        return self.weight

    @property
    def pads(self) -> bool:
        """Whether the kernel puts the input's zero point around it."""
        return False

    def input_arguments(self) -> tuple[float, int, Tensor | None]:
        """Scale and zero point of the input, and the bias, as the kernels take them.

        What a zero point takes from each sum is the same for every output of a channel, unless some of them see
        padding. In the bias it costs nothing; the kernels take up to twice as long with a zero point. The bias is
        rounded, though: a float result, which nothing rounds once more, wouldn't be exactly zero where it should be.
        """
        scale, zero_point = self.qparams("input")
        if zero_point == 0 or self.pads or self.gives_float:
            return scale, zero_point, self.bias
        sums = self.weight.flatten(1).sum(1, dtype=torch.int64)
        taken = sums.to(torch.float64) * self.weight_scale.to(torch.float64) * (scale * zero_point)
        bias = -taken if self.bias is None else self.bias.to(torch.float64) - taken
        return scale, 0, bias.to(torch.float32)

    @property
    def is_bare(self) -> bool:
        """Whether there is no activation but what every kernel knows."""
        return self.given[0] == "none"

    @property
    def suffix(self) -> str:
        """The activation, as the end of a name."""
        return "" if self.activation[0] == "none" else f" + {self.activation[0]}"

    @property
    def relu(self) -> str:
        """The same, as an engine's kernels have it in their names."""
        return "" if self.activation[0] == "none" else "_relu"

    def check_state(self) -> None:
        """A weight may be loaded that no rule has seen, and the model may come from another CPU.

        Raises:
            LoweringError: sums of the weight could leave 32 bits.
            BackendUnavailableError: the model comes from a CPU with other instructions, and its weights could saturate
                here.
        """
        super().check_state()
        if could_saturate(self.kernel_weight(), self.input_max):
            raise pair_limited.saturation_error(self.weight)

    @property
    def knows_relu(self) -> bool:
        """Whether the kernel can compute a ReLU."""
        return True

    def extra_repr(self) -> str:
        """Weight shape and activation."""
        return f"weight={tuple(self.weight.shape)}, activation={self.activation[0]}"


class QConv(_Weighted):
    """A convolution of 1, 2 or 3 dimensions.

    Args:
        weight: int8, symmetric, (out, in / groups, ...).
        bias: float32.
        input: qparams of the activation.
        output: qparams of the result; ``None`` for float.
        given: see :class:`_Weighted`.
        geometry: stride, padding, dilation (one number for each dimension) and groups.
        merged: how many neighbouring groups to compute as one, where the kernel for them alone is slow.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        input: QParams,
        output: QParams | None,
        given: tuple[str, list[float], str],
        geometry: Geometry,
        merged: int = 1,
    ) -> None:
        self.dimensions = weight.values.dim() - 2
        super().__init__(weight, bias, input, output, given)
        self.geometry = geometry
        self.merged = merged

    @property
    def width(self) -> int:
        """How many channels the input has."""
        return int(self.weight.shape[1]) * self.geometry[3]

    @property
    def pads(self) -> bool:
        """Whether there is any padding."""
        return any(self.geometry[1])

    @property
    def knows_relu(self) -> bool:
        """The 3d kernel computes no activation."""
        return self.dimensions < 3

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        if self.has_quantized_kernel:
            return f"quantized::conv2d{self.relu}"
        return f"onednn::qconv{self.dimensions}d_pointwise{self.suffix}"

    @property
    def has_quantized_kernel(self) -> bool:
        """Whether ``quantized::conv2d`` computes it: to integers, without an activation that only oneDNN knows."""
        return self.dimensions == 2 and not self.gives_float and self.is_bare and has_engine("onednn")

    def merging(self) -> int:
        """How many groups are computed as one: 1 if products that come together so could saturate."""
        is_wrong = self.merged > 1 and could_saturate(self._merged(self.merged), self.input_max)
        return 1 if is_wrong else self.merged

    def _merged(self, number: int) -> Tensor:
        return self.weight if number == 1 else merge_groups(self.weight, self.geometry[3], number)

    def kernel_weight(self) -> Tensor:
        """The weight with groups merged."""
        return self._merged(self.merging())

    def _geometry(self) -> tuple[Any, ...]:
        return (*self.geometry[:3], self.geometry[3] // self.merging())

    def _constants(self) -> tuple[Callable[[Tensor], tuple[Any, ...]], Tensor | None]:
        """What the plain kernels take after an activation of some shape, and the bias."""
        weight = self.kernel_weight()
        scale, zero_point, bias = self.input_arguments()
        zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)

        def pack(shape: torch.Size) -> tuple[Any, ...]:
            geometry = (*self._geometry(), list(shape))
            packed = _ONEDNN.qconv_prepack(weight, self.weight_scale, scale, zero_point, *geometry)
            return scale, zero_point, packed, self.weight_scale, zero_points

        return by_shape(pack), bias

    def engine(self, shape: torch.Size) -> str:
        """The engine whose kernel is the fastest for an input shape."""
        if not is_exact("fbgemm"):
            return "onednn"
        return engine_of_conv(self.weight, self.geometry, self.input_max, shape, has_vnni())

    def _packed_of_engine(self, shape: torch.Size, bias: Tensor | None) -> Any:
        """What the engine's kernels take; it prepares its kernel for the first shape that it meets."""
        with engine(self.engine(shape)):
            return _QUANTIZED.conv2d_prepack(
                quantized_weight(self.kernel_weight(), self.weight_scale), bias, *self._geometry()
            )

    def pack(self) -> Callable[..., Tensor]:
        """The kernel with its constants bound."""
        _, zero_point = self.qparams("input")
        run = in_any_windows(self.weight, self.geometry, zero_point, self._run_of_geometry)
        return bounded(with_batch(run, self.dimensions + 2, self.width), self.cuts)

    def _run_of_geometry(self, geometry: Geometry) -> Callable[[Tensor], Tensor]:
        twin = copy.copy(self)
        twin.geometry = geometry
        return twin._run_of_engine() if self.has_quantized_kernel else twin._run_of_plain()

    def _run_of_engine(self) -> Callable[..., Tensor]:
        kernel = getattr(_QUANTIZED, f"conv2d{self.relu}").new
        scale, zero_point, bias = self.input_arguments()
        output, packed = (
            self.qparams("output"),
            by_shape(lambda shape: self._packed_of_engine(shape, bias), self.engine),
        )
        return lambda x: as_plain(kernel(as_quantized(x, scale, zero_point), packed(x), *output))

    def _run_of_plain(self) -> Callable[..., Tensor]:
        kernel = getattr(_ONEDNN, f"qconv{self.dimensions}d_pointwise").default
        constants, bias = self._constants()
        arguments = (bias, *self._geometry(), *self.output_arguments(), *self.activation)
        dimensions = self.dimensions

        def run(x: Tensor) -> Tensor:
            y: Tensor = kernel(x, *constants(x), *arguments)
            # Of an empty batch the 1d kernel returns four dimensions.
            return y if dimensions > 1 or x.shape[0] else y.squeeze(2)

        return run


class QConvAdd(QConv):
    """A 2d convolution plus a residual, rounded once; called with the activation and the residual.

    Args:
        other: qparams of the residual.
        overwrites: whether the result may be written over the residual.
        arguments: see :class:`QConv`.
    """

    def __init__(self, *arguments: Any, other: QParams, overwrites: bool) -> None:
        super().__init__(*arguments)
        self.add_qparams("other", other)
        self.overwrites = overwrites

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"onednn::qconv2d_pointwise + sum{self.suffix}"

    @property
    def has_quantized_kernel(self) -> bool:
        """``quantized::conv2d_add`` looks at the process's engine when it runs, not only when the weight is packed."""
        return False

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound; another computation where it would have to broadcast."""
        in_kernel = with_batch(self._run_of_plain(), 4, self.width)
        in_float = functools.cache(self._run_in_float)
        is_rewritten = rewriting(self.weight, self.geometry, self.qparams("input")[1])

        def run(x: Tensor, other: Tensor) -> Tensor:
            # The examples had one shape; an input of another size may leave another.
            fits = x.dim() == other.dim() and other.shape[-3:] == self._shape_of_one(x)
            return in_kernel(x, other) if fits and not is_rewritten(x.shape[-2:]) else in_float()(x, other)

        return bounded(run, self.cuts)

    def _shape_of_one(self, x: Tensor) -> tuple[int, ...]:
        """Channels, height and width of the convolution's result."""
        places = zip(x.shape[-2:], self.weight.shape[2:], *self.geometry[:3], strict=True)
        sizes = ((n + 2 * pad - step * (k - 1) - 1) // stride + 1 for n, k, stride, pad, step in places)
        return (self.weight.shape[0], *sizes)

    def _run_in_float(self) -> Callable[[Tensor, Tensor], Tensor]:
        weight = QuantizedWeight(self.weight, self.weight_scale, torch.zeros_like(self.weight_scale), 0)
        input = QParams(*self.qparams("input"), 0, self.input_max, torch.uint8)
        convolved = QConv(weight, self.bias, input, None, ("none", [], ""), self.geometry, self.merged).pack()
        other_qparams, output = self.qparams("other"), self.qparams("output")
        activation = torch.relu if self.activation[0] == "relu" else torch.positive

        def run(x: Tensor, other: Tensor) -> Tensor:
            return quantize(activation(convolved(x) + dequantize(other, *other_qparams)), *output)

        return run

    def _run_of_plain(self) -> Callable[[Tensor, Tensor], Tensor]:
        kernel = _ONEDNN.qconv2d_pointwise.binary
        constants, bias = self._constants()
        tail = (*self.qparams("output"), torch.uint8, *self.qparams("other"), "sum", 1.0, *self.activation)
        arguments = (bias, *self._geometry(), *tail)
        overwrites, channels_last = self.overwrites, torch.channels_last

        def run(x: Tensor, other: Tensor) -> Tensor:
            if x.shape[0] != other.shape[0]:  # Examples with a batch of 1 don't tell which side has always 1.
                batch = x.shape[0] if other.shape[0] == 1 else other.shape[0]
                x, other = x.expand(batch, -1, -1, -1), other.expand(batch, -1, -1, -1).clone()
            # The kernel writes its result over the residual (and returns a copy), and needs it in its own layout.
            if not other.is_contiguous(memory_format=channels_last):
                other = other.contiguous(memory_format=channels_last)
            elif not overwrites:
                other = other.clone()
            y: Tensor = kernel(x, *constants(x), other, *arguments)
            return y

        return run


class QLinear(_Weighted):
    """A linear layer on inputs of any number of leading dimensions."""

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        plain = f"onednn::qlinear_pointwise{self.suffix}"
        return f"quantized::linear, for many rows {plain}" if is_exact("fbgemm") else plain

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound; the weight is packed for those kernels that are needed."""
        on_fbgemm, on_onednn = functools.cache(self._run_of_engine), functools.cache(self._run_of_plain)
        limit, (width, inputs), dtype = limits(has_vnni()), self.weight.shape, self.output_arguments()[2]
        most_rows = (limit.rows if self.is_bare else limit.rows_then_float) if is_exact("fbgemm") else 0

        def run(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((*x.shape[:-1], width), dtype=dtype)  # The kernels forget leading dimensions.
            return (on_fbgemm if x.numel() <= most_rows * inputs else on_onednn)()(x)

        return bounded(with_batch(run, 2, inputs), self.cuts)

    def _run_of_engine(self, name: str = "fbgemm") -> Callable[[Tensor], Tensor]:
        with engine(name):
            packed = _QUANTIZED.linear_prepack(quantized_weight(self.kernel_weight(), self.weight_scale), self.bias)
        input, (scale, zero_point, dtype) = self.qparams("input"), self.output_arguments()
        if dtype == torch.uint8 and self.is_bare:
            kernel = getattr(_QUANTIZED, f"linear{self.relu}").default
            return lambda x: as_plain(kernel(as_quantized(x, *input), packed, scale, zero_point))
        to_float = _QUANTIZED.linear_with_input_q_dq_qweight_dq_output_fp32.default

        def run(x: Tensor) -> Tensor:
            # It quantizes what it reads, which gives the integers back.
            y = self._in_float(to_float(dequantize(x, *input), *input, packed))
            return y if dtype == torch.float32 else quantize(y, scale, zero_point)

        return run

    def _in_float(self, x: Tensor) -> Tensor:
        """The activation."""
        name, scalars, _ = self.given
        return x if name == "none" else getattr(F, {"swish": "silu"}.get(name, name))(x, *scalars)

    def _run_of_plain(self) -> Callable[[Tensor], Tensor]:
        kernel = _ONEDNN.qlinear_pointwise.default
        # A weight that isn't packed would crash the process, so it is packed in the same line.
        packed = _ONEDNN.qlinear_prepack(self.weight.contiguous(), None)
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int32)
        scale, zero_point, bias = self.input_arguments()
        constants = (scale, zero_point, packed, self.weight_scale, zero_points, bias)
        tail = (*self.output_arguments(), *self.activation)
        return lambda x: kernel(x, *constants, *tail)


class QDynamicLinear(WeightKernel):
    """A linear layer from float to float, that takes the range of each input as it comes.

    Args:
        weight: int8, symmetric.
        bias: float32.
    """

    kernel_name = "onednn::qlinear_pointwise, range at run time"
    takes_float = True

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        kernel = _ONEDNN.qlinear_pointwise.tensor
        packed = _ONEDNN.qlinear_prepack(self.weight.contiguous(), None)
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int32)
        tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        constants = (packed, self.weight_scale, zero_points, self.bias, *tail)
        width, inputs = self.weight.shape

        def run(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((*x.shape[:-1], width), dtype=torch.float32)
            scale, zero_point = ops.dynamic_qparams(x, 0, 255)
            integers = ops.quantize_per_tensor(x, scale, zero_point, 0, 255, torch.uint8)
            y: Tensor = kernel(integers, scale, zero_point, *constants)
            return y

        return with_batch(run, 2, inputs)


class QMaxPool2d(KernelModule):
    """The maximum over windows, on integers as they are.

    Args:
        geometry: kernel size, stride, padding, dilation and ceil mode.
    """

    kernel_name = "max_pool2d on integers"

    def __init__(self, geometry: tuple[Any, ...]) -> None:
        super().__init__()
        self.geometry = geometry

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        geometry = self.geometry
        if shells.HAS_QUANTIZED:
            kernel = torch.ops.quantized.max_pool2d.default
            # The kernel wants a batch.
            return lambda x: kernel(x, *geometry) if x.dim() == 4 else kernel(x.unsqueeze(0), *geometry).squeeze(0)
        return lambda x: torch.max_pool2d(x.to(torch.float32), *geometry).to(torch.uint8)
