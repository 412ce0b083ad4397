"""Convolutions and linear layers of quantized tensors on torch's engines, whichever engine it is.

A backend derives its classes from these and a subclass of :class:`EngineKernel` with what is its own: the engine, and
what a loaded state must keep to (``check_state``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore.errors import LoweringError
from qcore.lowering import QParams, QuantizedWeight
from qcore_torch_kernels.engines import engine
from qcore_torch_kernels.kernel import WeightKernel, with_batch
from qcore_torch_kernels.shells import bounded, quantized_weight

#: The dynamic kernels never take steps below 2**-14, in which small inputs are lost; so inputs come to them enlarged by
#: this, and weights as much smaller. By a power of two no bit of a result changes.
DYNAMIC_UNIT = 2.0**40

#: Stride, padding, dilation, one number for each dimension, and groups.
Geometry = tuple[list[int], list[int], list[int], int]
#: Stride, padding, output padding, dilation, one number for each dimension, and groups.
TransposedGeometry = tuple[list[int], list[int], list[int], list[int], int]


def operator(name: str) -> Any:
    """One of torch's operators on quantized tensors."""
    return getattr(torch.ops.quantized, name)


class EngineKernel(WeightKernel):
    """Base for kernels with a weight on one of torch's engines.

    Attributes:
        engine: its name, as torch knows it.
        needs_normal_scale: whether it computes with the scale of its sums, which must be one of float32's normal
            numbers; so the input's is kept, to look at what is loaded.
    """

    engine: str
    needs_normal_scale = False

    @property
    def title(self) -> str:
        """The engine's name in those of kernels."""
        return self.engine.upper()


class Weighted(EngineKernel):
    """What convolution and linear kernels have in common: the state.

    Args:
        weight: int8, symmetric.
        bias: float32.
        output: qparams of the result.
        input: qparams of the activation; ``None``: whatever is loaded is taken.
    """

    keeps_scale = True

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, output: QParams, input: QParams | None = None
    ) -> None:
        super().__init__(weight, bias)
        self.input_max = 0 if input is None else input.quant_max
        if input is not None and self.needs_normal_scale:
            self.add_qparams("input", input)
        self.add_qparams("output", output)

    def check_state(self) -> None:
        """Refuse a state that was loaded, where a rule would have declined it.

        Raises:
            LoweringError: sums could leave 32 bits, or their scale is below float32's normal numbers.
        """
        super().check_state()
        smallest = float(self.weight_scale.min()) if self.weight_scale.numel() else 1.0
        if "input" in self._ranges and self.qparams("input")[0] * smallest < torch.finfo(torch.float32).tiny:
            raise LoweringError(
                "scales were loaded that a kernel can't compute with: those of its input and its weight have a product "
                "below float32's smallest normal number. Convert the model that they come from, or load them into a "
                "reference model"
            )

    @property
    def relu(self) -> str:
        """How the kernel's name ends: a cut at zero and nowhere else is its own ReLU."""
        return "_relu" if self.bounds("output") == (self.qparams("output")[1], 255) else ""

    @property
    def cuts(self) -> tuple[int, int] | None:
        """The bounds that the kernel doesn't keep to by itself."""
        return None if self.relu else self.bounds("output")

    def on_batches(self, kernel: Any, prepack: str, arguments: tuple[Any, ...], width: int) -> Callable[..., Tensor]:
        """The kernel with its constants bound, on inputs with a batch or without.

        Args:
            kernel: the operator's overload.
            prepack: the name of the operator that packs the weight.
            arguments: what it takes besides.
            width: the input's channels.
        """
        with engine(self.engine):
            packed = operator(prepack)(quantized_weight(self.weight, self.weight_scale), self.bias, *arguments)
        scale, zero_point = self.qparams("output")
        run = self.around(lambda x: kernel(x, packed, scale, zero_point))
        return with_batch(run, self.weight.dim(), width)

    def around(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The kernel on batches with what a backend does before and after it."""
        return run


class QConv(Weighted):
    """A convolution of 1, 2 or 3 dimensions.

    Args:
        weight: int8, symmetric, (out, in / groups, ...).
        bias: float32.
        output: qparams of the result.
        geometry: of the convolution.
        input: see :class:`Weighted`.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        output: QParams,
        geometry: Geometry,
        input: QParams | None = None,
    ) -> None:
        super().__init__(weight, bias, output, input)
        self.geometry = geometry

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"{self.title} conv{self.weight.dim() - 2}d{self.relu}"

    def packed_geometry(self) -> Geometry:
        """The geometry that the weight is packed for."""
        return self.geometry

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        name = f"conv{self.weight.dim() - 2}d"
        kernel = operator(name + self.relu)
        overload = kernel.default if name == "conv1d" else kernel.new
        width = self.weight.shape[1] * self.geometry[3]
        return bounded(self.on_batches(overload, f"{name}_prepack", self.packed_geometry(), width), self.cuts)


class QConvTranspose(Weighted):
    """A transposed convolution of 1, 2 or 3 dimensions, with one scale for its whole weight.

    Args:
        weight: int8, symmetric, (in, out / groups, ...).
        bias: float32.
        output: qparams of the result.
        geometry: of the convolution.
        input: see :class:`Weighted`.
    """

    out_axis = 1

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        output: QParams,
        geometry: TransposedGeometry,
        input: QParams | None = None,
    ) -> None:
        super().__init__(weight, bias, output, input)
        self.geometry = geometry

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"{self.title} conv_transpose{self.weight.dim() - 2}d"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        name = f"conv_transpose{self.weight.dim() - 2}d"
        run = self.on_batches(operator(name).default, f"{name}_prepack", self.geometry, self.weight.shape[0])
        return bounded(run, self.bounds("output"))


class QLinear(Weighted):
    """A linear layer on inputs of any number of leading dimensions; arguments as those of :class:`Weighted`."""

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"{self.title} linear{self.relu}"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        kernel = operator(f"linear{self.relu}").default
        return bounded(self.on_batches(kernel, "linear_prepack", (), self.weight.shape[1]), self.cuts)


class QDynamicLinear(EngineKernel):
    """A linear layer from float to float, that takes the range of each input as it comes.

    Args:
        weight: int8, symmetric.
        bias: float32.
    """

    takes_float = True

    @property
    def kernel_name(self) -> str:
        """For ``explain``."""
        return f"{self.title} linear, range at run time"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The kernel with its constants bound."""
        with engine(self.engine):
            weight = quantized_weight(self.weight, self.weight_scale.double() / DYNAMIC_UNIT)
            packed = operator("linear_prepack")(weight, self.bias)
        kernel = operator("linear_dynamic").default
        return with_batch(lambda x: kernel(x * DYNAMIC_UNIT, packed), 2, self.weight.shape[1])
