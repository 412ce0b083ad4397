"""The one room that calls torch's native operators: oneDNN's on plain tensors, and a few of torch's quantized ones.

A plain tensor and a quantized one share their storage (``_as_quantized``, ``_as_plain``), so nothing is copied between
the two families. Where a torch no longer has the quantized ones, plain float arithmetic takes their place.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore import ops
from qcore.lowering import KernelModule, QParams, QuantizedWeight

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


def missing_kernels() -> list[str]:
    """The names of needed operators that this torch doesn't have."""
    if not torch.backends.mkldnn.is_available():
        return ["oneDNN"]
    return [f"onednn::{name}" for name in _NEEDED if not hasattr(_ONEDNN, name)]


def has_vnni() -> bool:
    """Whether the CPU adds four products in 32 bits, so that nothing saturates."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def _as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor on the storage of a plain one."""
    shell = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=_QUANTIZED_DTYPE)
    return shell.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _as_plain(x: Tensor) -> Tensor:
    """A plain tensor on the storage of a quantized one."""
    shell = torch.empty(0, dtype=torch.uint8)
    return shell.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


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
        bounds = self.bounds
        if not _HAS_QUANTIZED:
            low, high = bounds or (0, 255)
            arguments = (self.output_scale, self.output_zero_point, low, high, torch.uint8)
            return lambda x: ops.quantize_per_tensor(x, *arguments)
        quantize, dtype = torch.quantize_per_tensor, _QUANTIZED_DTYPE
        with warnings.catch_warnings():
            # torch says once in a process that quantized dtypes are deprecated; users of qcore needn't hear it.
            warnings.simplefilter("ignore")
            quantize(torch.zeros(1), scale, zero_point, dtype)
        if bounds:
            return lambda x: _as_plain(quantize(x, scale, zero_point, dtype)).clamp_(*bounds)
        return lambda x: _as_plain(quantize(x, scale, zero_point, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as integers."""
        run: Callable[[Tensor], Tensor] = self._packed or self.packed()
        return run(x)


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
        return lambda x: _as_quantized(x, scale, zero_point).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """The real values of ``x``."""
        run: Callable[[Tensor], Tensor] = self._packed or self.packed()
        return run(x)


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

    @property
    def knows_relu(self) -> bool:
        """Whether the kernel can compute a ReLU."""
        return True

    def forward(self, *inputs: Tensor) -> Tensor:
        """The result's integers."""
        run: Callable[..., Tensor] = self._packed or self.packed()
        return run(*inputs)

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
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        input: QParams,
        output: QParams | None,
        activation: tuple[str, list[float], str],
        geometry: tuple[list[int], list[int], list[int], int],
    ) -> None:
        self.dimensions = weight.values.dim() - 2
        super().__init__(weight, bias, input, output, activation)
        self.geometry = geometry

    @property
    def knows_relu(self) -> bool:
        """The 3d kernel computes no activation."""
        return self.dimensions < 3

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        activation = "" if self.activation[0] == "none" else f" + {self.activation[0]}"
        return f"onednn::qconv{self.dimensions}d_pointwise{activation}"

    def _constants(self) -> tuple[Any, ...]:
        input_scale, input_zero_point = self.qparams("input")
        packed = _ONEDNN.qconv_prepack(
            self.weight, self.weight_scale, input_scale, input_zero_point, *self.geometry, None
        )
        zero_points = torch.zeros(self.weight.shape[0], dtype=torch.int32)
        return input_scale, input_zero_point, packed, self.weight_scale, zero_points

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        kernel = getattr(_ONEDNN, f"qconv{self.dimensions}d_pointwise").default
        constants, bias, geometry = self._constants(), self.bias, self.geometry
        tail = (*self.output_arguments(), *self.activation)

        def run(x: Tensor) -> Tensor:
            y: Tensor = kernel(x, *constants, bias, *geometry, *tail)
            return y

        if self.dimensions == 1:
            # Of an empty batch the 1d kernel returns four dimensions.
            return _bounded(lambda x: run(x) if x.shape[0] else run(x).squeeze(2), self.bounds)
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
        constants, bias, geometry = self._constants(), self.bias, self.geometry
        tail = (*self.qparams("output"), torch.uint8, *self.qparams("other"), "sum", 1.0, *self.activation)
        overwrites, channels_last = self.overwrites, torch.channels_last

        def run(x: Tensor, other: Tensor) -> Tensor:
            # The kernel writes its result over the residual, and needs it in its own layout.
            if not other.is_contiguous(memory_format=channels_last):
                other = other.contiguous(memory_format=channels_last)
            elif not overwrites:
                other = other.clone()
            y: Tensor = kernel(x, *constants, other, bias, *geometry, *tail)
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
        constants = (*self.qparams("input"), packed, self.weight_scale, zero_points, self.bias)
        tail = (*self.output_arguments(), *self.activation)
        width = self.weight.shape[0]

        def run(x: Tensor) -> Tensor:
            if x.numel() == 0:
                return torch.empty((*x.shape[:-1], width), dtype=tail[2])  # The kernel forgets leading dimensions.
            y: Tensor = kernel(x, *constants, *tail)
            return y

        return _bounded(run, self.bounds)


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

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The result's integers."""
        run: Callable[[Tensor, Tensor], Tensor] = self._packed or self.packed()
        return run(a, b)


class QAdd(_Binary):
    """A sum of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::add"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound; not ``onednn::qadd``, which is slower and wrong for mixed layouts."""
        in_float = self.in_float(torch.add)
        if not _HAS_QUANTIZED:
            return in_float
        # The form with an output doesn't look at the process's quantized engine.
        add, empty = torch.ops.quantized.add.out, torch._empty_affine_quantized
        first, second, (scale, zero_point) = self.qparams("first"), self.qparams("second"), self.qparams("output")

        def run(a: Tensor, b: Tensor) -> Tensor:
            if a.shape != b.shape:
                return in_float(a, b)
            layout = torch.channels_last if a.dim() == 4 else torch.contiguous_format
            out = empty(a.shape, scale=scale, zero_point=zero_point, dtype=_QUANTIZED_DTYPE, memory_format=layout)
            add(_as_quantized(a, *first), _as_quantized(b, *second), out)
            return _as_plain(out)

        return _bounded(run, self.bounds)


class QMul(_Binary):
    """A product of two activations, of the same shape or broadcast."""

    kernel_name = "quantized::mul"

    def pack(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The kernel with its constants bound."""
        if not _HAS_QUANTIZED:
            return self.in_float(torch.mul)
        mul = torch.ops.quantized.mul.default
        first, second, output = self.qparams("first"), self.qparams("second"), self.qparams("output")
        return _bounded(
            lambda a, b: _as_plain(mul(_as_quantized(a, *first), _as_quantized(b, *second), *output)), self.bounds
        )


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
            return lambda x: kernel(x, *geometry)
        return lambda x: torch.max_pool2d(x.to(torch.float32), *geometry).to(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        """The result's integers."""
        run: Callable[[Tensor], Tensor] = self._packed or self.packed()
        return run(x)


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

    def forward(self, x: Tensor) -> Tensor:
        """The result's integers."""
        return x.clamp(self.low, self.high)


def _narrower(output: QParams) -> tuple[int, int] | None:
    """The range of a result, if it is narrower than what a kernel writes."""
    bounds = (output.quant_min, output.quant_max)
    return None if bounds == (0, 255) else bounds


def _bounded(run: Callable[..., Tensor], bounds: tuple[int, int] | None) -> Callable[..., Tensor]:
    if bounds is None:
        return run
    low, high = bounds
    return lambda *inputs: run(*inputs).clamp_(low, high)
