"""The one room that calls torch's native operators: oneDNN's on plain tensors, and a few of torch's quantized ones.

A plain tensor and a quantized one share their storage (``_as_quantized``, ``_as_plain``), so nothing is copied between
the two families. Where a torch no longer has the quantized ones, plain float arithmetic takes their place.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcore import ops
from qcore.errors import BackendUnavailableError
from qcore.lowering import KernelModule, QParams, QuantizedWeight, WeightKernel
from qcore_x86_onednn.observers import largest_sum

_ONEDNN = torch.ops.onednn
_NEEDED = (
    "qconv1d_pointwise",
    "qconv2d_pointwise",
    "qconv3d_pointwise",
    "qconv_prepack",
    "qlinear_pointwise",
    "qlinear_prepack",
)

_QUANTIZED_DTYPE: torch.dtype = getattr(torch, "quint8", torch.uint8)

_HAS_QUANTIZED = (
    torch.uint8 != _QUANTIZED_DTYPE
    and hasattr(torch, "_empty_affine_quantized")
    and hasattr(torch, "quantize_per_tensor")
    and hasattr(torch.ops.quantized, "max_pool2d")
)

if _HAS_QUANTIZED:
    with warnings.catch_warnings():
        # torch says once in a process that quantized dtypes are deprecated; users of qcore needn't hear it.
        warnings.simplefilter("ignore")
        torch._empty_affine_quantized([0], scale=1.0, zero_point=0, dtype=_QUANTIZED_DTYPE)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, _QUANTIZED_DTYPE)


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
    """Whether kernels lose something at the ends of the ranges: all weights 127, all activations 255."""
    exact = 127 * 255 * 16
    one = torch.ones(16)
    for size in (0, 1, 3):
        weight = QuantizedWeight(torch.full((16, 16, *[size] * min(size, 2)), 127, dtype=torch.int8), one, one * 0, 0)
        x = torch.full((2, 16, *[size] * min(size, 2)), 255, dtype=torch.uint8)
        qparams = QParams(1.0, 0, 0, 255, torch.uint8)
        kernel: _Weighted
        if size == 0:
            kernel = QLinear(weight, None, qparams, None, ("none", [], ""))
        else:
            kernel = QConv(weight, None, qparams, None, ("none", [], ""), ([1, 1], [0, 0], [1, 1], 1))
        if not bool((kernel.pack()(x) == exact * max(size, 1) ** 2).all()):
            return True
    return False


def could_saturate(weight: Tensor, input_max: int) -> bool:
    """Whether a pair of products could overflow 16 bits on this CPU.

    Args:
        weight: int8, (out, in, ...).
        input_max: the largest integer that the activation takes.
    """
    return not has_vnni() and largest_sum(weight) * input_max > 2**15 - 1


def merge_groups(weight: Tensor, groups: int, number: int) -> Tensor:
    """The weight of the same grouped convolution with every ``number`` neighbouring groups made one.

    Args:
        weight: (out, in / groups, ...).
        groups: of the convolution.
        number: divides ``groups``.

    Returns:
        A weight (out, number * in / groups, ...), zero wherever groups met that had nothing in common.
    """
    out, width, *kernel = weight.shape
    merged = weight.new_zeros(groups // number, number, out // groups, number, width, *kernel)
    for member, part in enumerate(weight.view(groups // number, number, out // groups, width, *kernel).unbind(1)):
        merged[:, member, :, member] = part
    return merged.view(out, number * width, *kernel)


def _as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor on the storage of a plain one."""
    shell = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=_QUANTIZED_DTYPE)
    return shell.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _as_plain(x: Tensor) -> Tensor:
    """A plain tensor on the storage of a quantized one."""
    shell = torch.empty(0, dtype=torch.uint8)
    return shell.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Float to uint8."""
    return _as_plain(torch.quantize_per_tensor(x, scale, zero_point, _QUANTIZED_DTYPE))


def _dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """uint8 to float."""
    return _as_quantized(x, scale, zero_point).dequantize()


def _add(
    a: Tensor, b: Tensor, a_qparams: tuple[float, int], b_qparams: tuple[float, int], qparams: tuple[float, int]
) -> Tensor:
    """A sum of two tensors of the same shape; the qparams are scales and zero points."""
    layout = torch.channels_last if a.dim() == 4 else torch.contiguous_format
    scale, zero_point = qparams
    out = torch._empty_affine_quantized(
        a.shape, scale=scale, zero_point=zero_point, dtype=_QUANTIZED_DTYPE, memory_format=layout
    )
    # The form with an output doesn't look at the process's quantized engine.
    torch.ops.quantized.add.out(_as_quantized(a, *a_qparams), _as_quantized(b, *b_qparams), out)
    return _as_plain(out)


def _mul(
    a: Tensor, b: Tensor, a_qparams: tuple[float, int], b_qparams: tuple[float, int], qparams: tuple[float, int]
) -> Tensor:
    """A product of two tensors that broadcast; the qparams are scales and zero points."""
    return _as_plain(
        torch.ops.quantized.mul.default(_as_quantized(a, *a_qparams), _as_quantized(b, *b_qparams), *qparams)
    )


class Quantize(KernelModule):
    """Float to uint8.

    Args:
        output: the qparams.
    """

    kernel_name = "quantize"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)
        self.bounds = _narrower(output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its constants bound."""
        scale, zero_point = self.qparams("output")
        if not _HAS_QUANTIZED:
            low, high = self.bounds or (0, 255)
            arguments = (self.output_scale, self.output_zero_point, low, high, torch.uint8)
            return lambda x: ops.quantize_per_tensor(x, *arguments)
        return _bounded(lambda x: _quantize(x, scale, zero_point), self.bounds)


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
        scale, zero_point = self.qparams("input")
        if not _HAS_QUANTIZED:
            return lambda x: ops.dequantize_per_tensor(x, self.input_scale, self.input_zero_point)
        return lambda x: _dequantize(x, scale, zero_point)


class _Weighted(KernelModule):
    """What convolution and linear kernels have in common: the state.

    Args:
        weight: int8, symmetric.
        bias: float32.
        input: qparams of the activation.
        output: qparams of the result; ``None`` for float.
        activation: oneDNN's name of the activation to compute in the kernel, its scalars and its algorithm.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        input: QParams,
        output: QParams | None,
        activation: tuple[str, list[float], str],
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale_per_channel.to(torch.float32))
        self.register_buffer("bias", None if bias is None else bias.to(torch.float32))
        self.add_qparams("input", input)
        self.activation = activation
        self.input_max = input.quant_max
        self.gives_float = output is None
        self.bounds: tuple[int, int] | None = None
        if output is None:
            return
        self.add_qparams("output", output)
        self.bounds = _narrower(output)
        if self.bounds and activation[0] == "none" and self.bounds == (output.zero_point, 255) and self.knows_relu:
            self.activation, self.bounds = ("relu", [], ""), None

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

    def packed(self) -> Any:
        """What ``pack`` gave, made once.

        Raises:
            BackendUnavailableError: the model comes from a CPU with other instructions, and its weights could saturate
                here.
        """
        if self._packed is None and could_saturate(self.kernel_weight(), self.input_max):
            raise BackendUnavailableError(
                "This model was converted on a CPU with VNNI instructions. On this CPU, which has none, sums of its "
                "weights could saturate in 16 bits; prepare and convert it here, or run its reference model"
            )
        return super().packed()

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
        activation: see :class:`_Weighted`.
        geometry: stride, padding, dilation (one number for each dimension) and groups.
        merged: how many neighbouring groups to compute as one, where the kernel for them alone is slow.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        input: QParams,
        output: QParams | None,
        activation: tuple[str, list[float], str],
        geometry: tuple[list[int], list[int], list[int], int],
        merged: int = 1,
    ) -> None:
        self.dimensions = weight.values.dim() - 2
        super().__init__(weight, bias, input, output, activation)
        self.geometry = geometry
        self.merged = merged

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
        activation = "" if self.activation[0] == "none" else f" + {self.activation[0]}"
        return f"onednn::qconv{self.dimensions}d_pointwise{activation}"

    def kernel_weight(self) -> Tensor:
        """The weight with groups merged."""
        return self.weight if self.merged == 1 else merge_groups(self.weight, self.geometry[3], self.merged)

    def _constants(self) -> tuple[tuple[Any, ...], tuple[Any, ...], Tensor | None]:
        """What the kernels take after the activation, the geometry, and the bias."""
        weight = self.kernel_weight()
        geometry = (*self.geometry[:3], self.geometry[3] // self.merged)
        input_scale, input_zero_point, bias = self.input_arguments()
        packed = _ONEDNN.qconv_prepack(weight, self.weight_scale, input_scale, input_zero_point, *geometry, None)
        zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)
        return (input_scale, input_zero_point, packed, self.weight_scale, zero_points), geometry, bias

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        kernel = getattr(_ONEDNN, f"qconv{self.dimensions}d_pointwise").default
        constants, geometry, bias = self._constants()
        arguments = (bias, *geometry, *self.output_arguments(), *self.activation)
        dimensions = self.dimensions

        def run(x: Tensor) -> Tensor:
            if x.dim() == dimensions + 1:
                return run(x.unsqueeze(0)).squeeze(0)  # The kernels want a batch.
            y: Tensor = kernel(x, *constants, *arguments)
            # Of an empty batch the 1d kernel returns four dimensions.
            return y if dimensions > 1 or x.shape[0] else y.squeeze(2)

        return _bounded(run, self.bounds)


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
        return "onednn::qconv2d_pointwise + sum" + ("" if self.activation[0] == "none" else f" + {self.activation[0]}")

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:  # type: ignore[override]
        """The kernel with its constants bound."""
        kernel = _ONEDNN.qconv2d_pointwise.binary
        constants, geometry, bias = self._constants()
        tail = (*self.qparams("output"), torch.uint8, *self.qparams("other"), "sum", 1.0, *self.activation)
        arguments = (bias, *geometry, *tail)
        overwrites, channels_last = self.overwrites, torch.channels_last

        def run(x: Tensor, other: Tensor) -> Tensor:
            if x.dim() == 3:
                return run(x.unsqueeze(0), other.unsqueeze(0)).squeeze(0)  # The kernel wants a batch.
            if x.shape[0] != other.shape[0]:  # Examples with a batch of 1 don't tell which side has always 1.
                batch = x.shape[0] if other.shape[0] == 1 else other.shape[0]
                x, other = x.expand(batch, -1, -1, -1), other.expand(batch, -1, -1, -1).clone()
            # The kernel writes its result over the residual, and needs it in its own layout.
            if not other.is_contiguous(memory_format=channels_last):
                other = other.contiguous(memory_format=channels_last)
            elif not overwrites:
                other = other.clone()
            y: Tensor = kernel(x, *constants, other, *arguments)
            return y

        return _bounded(run, self.bounds)


class QLinear(_Weighted):
    """A linear layer on inputs of any number of leading dimensions."""

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return "onednn::qlinear_pointwise" + ("" if self.activation[0] == "none" else f" + {self.activation[0]}")

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        kernel = _ONEDNN.qlinear_pointwise.default
        # A weight that isn't packed would crash the process, so it is packed in the same line.
        packed = _ONEDNN.qlinear_prepack(self.weight.contiguous(), None)
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int32)
        scale, zero_point, bias = self.input_arguments()
        constants = (scale, zero_point, packed, self.weight_scale, zero_points, bias)
        tail = (*self.output_arguments(), *self.activation)
        width = self.weight.shape[0]

        def run(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((*x.shape[:-1], width), dtype=tail[2])  # The kernel forgets leading dimensions.
            y: Tensor = kernel(x, *constants, *tail)
            return y

        return _bounded(run, self.bounds)


class QDynamicLinear(WeightKernel):
    """A linear layer from float to float, that takes the range of each input as it comes.

    Args:
        weight: int8, symmetric.
        bias: float32.
    """

    kernel_name = "onednn::qlinear_pointwise, range at run time"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        kernel = _ONEDNN.qlinear_pointwise.tensor
        packed = _ONEDNN.qlinear_prepack(self.weight.contiguous(), None)
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int32)
        tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        constants = (packed, self.weight_scale, zero_points, self.bias, *tail)
        width = self.weight.shape[0]

        def run(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((*x.shape[:-1], width))
            scale, zero_point = ops.dynamic_qparams(x, 0, 255)
            integers = ops.quantize_per_tensor(x, scale, zero_point, 0, 255, torch.uint8)
            y: Tensor = kernel(integers, scale, zero_point, *constants)
            return y

        return run


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
        self.bounds = _narrower(output)

    def in_float(self, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The computation without quantized kernels."""
        low, high = self.bounds or (0, 255)
        first, second = (self.first_scale, self.first_zero_point), (self.second_scale, self.second_zero_point)
        output = (self.output_scale, self.output_zero_point, low, high, torch.uint8)

        def run(a: Tensor, b: Tensor) -> Tensor:
            real = function(ops.dequantize_per_tensor(a, *first), ops.dequantize_per_tensor(b, *second))
            return ops.quantize_per_tensor(real, *output)  # type: ignore[no-any-return]

        return run


class QAdd(_Binary):
    """A sum of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::add"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound; not ``onednn::qadd``, which is slower and wrong for mixed layouts."""
        in_float = self.in_float(torch.add)
        if not _HAS_QUANTIZED:
            return in_float
        qparams = self.qparams("first"), self.qparams("second"), self.qparams("output")

        def run(a: Tensor, b: Tensor) -> Tensor:
            return _add(a, b, *qparams) if a.shape == b.shape else in_float(a, b)

        return _bounded(run, self.bounds)


class QMul(_Binary):
    """A product of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::mul"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound."""
        if not _HAS_QUANTIZED:
            return self.in_float(torch.mul)
        qparams = self.qparams("first"), self.qparams("second"), self.qparams("output")
        return _bounded(lambda a, b: _mul(a, b, *qparams), self.bounds)


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
        if _HAS_QUANTIZED:
            kernel = torch.ops.quantized.max_pool2d.default
            # The kernel wants a batch.
            return lambda x: kernel(x, *geometry) if x.dim() == 4 else kernel(x.unsqueeze(0), *geometry).squeeze(0)
        return lambda x: torch.max_pool2d(x.to(torch.float32), *geometry).to(torch.uint8)


class QLookup(KernelModule):
    """Any function of single values, by a table of its results.

    Args:
        table: the result's integer for each integer, uint8 (256,).
        function: its name.
    """

    table: Tensor

    def __init__(self, table: Tensor, function: str) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.kernel_name = f"{function} by table"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function with its tables bound."""
        single = self.table
        # Two neighbouring bytes at once, read as one index in the machine's own byte order, take half the time.
        of_index = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).to(torch.int64)
        double = single[of_index].view(torch.int16)

        def run(x: Tensor) -> Tensor:
            if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
                x = x.contiguous()
            flat = x.as_strided((x.numel(),), (1,))
            if x.numel() % 2 or x.storage_offset() % 2:
                return single.index_select(0, flat.to(torch.int32)).as_strided(x.shape, x.stride())
            pairs = double.index_select(0, flat.view(torch.uint16).to(torch.int32))
            return pairs.view(torch.uint8).as_strided(x.shape, x.stride())

        return run


class QNearest(KernelModule):
    """Interpolation that only repeats or drops elements, on integers as they are.

    Args:
        size: of the result.
        scale_factor: if there is no size.
        mode: ``"nearest"`` or ``"nearest-exact"``.
    """

    kernel_name = "interpolate on integers"

    def __init__(self, size: Any, scale_factor: Any, mode: str) -> None:
        super().__init__()
        self.arguments = (size, scale_factor, mode)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own."""
        arguments = self.arguments
        return lambda x: F.interpolate(x, *arguments)


class QClamp(KernelModule):
    """A clamp on integers as they are.

    Args:
        low: smallest integer.
        high: largest integer.
    """

    kernel_name = "clamp on integers"

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own."""
        low, high = self.low, self.high
        return lambda x: x.clamp(low, high)


def _narrower(output: QParams) -> tuple[int, int] | None:
    """The range of a result, if it is narrower than what a kernel writes."""
    bounds = (output.quant_min, output.quant_max)
    return None if bounds == (0, 255) else bounds


def _bounded(run: Callable[..., Tensor], bounds: tuple[int, int] | None) -> Callable[..., Tensor]:
    if bounds is None:
        return run
    low, high = bounds
    return lambda *inputs: run(*inputs).clamp_(low, high)
