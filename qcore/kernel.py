"""What kernels of any backend are made of: qparams, integer weights, and modules around a native function.

A kernel's state is plain tensors. What a native function takes besides (packed weights, Python numbers) is made of
them when it is first needed, and again whenever they change.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from qcore import ops
from qcore.dtypes import same_dtype
from qcore.errors import ShapeError
from qcore.replay.callers import are_plain, is_watched, needing_gradient, opaque, watched, without_gradient
from qcore.replay.executor import look_again

#: Packing may need a setting of the process (torch's quantized engine), whichever backend does it: one at a time.
PACKING = threading.RLock()


@dataclass(frozen=True)
class QParams:
    """How a per-tensor quantized value maps to real numbers: ``(q - zero_point) * scale``.

    Attributes:
        scale: real value of one step.
        zero_point: integer that represents zero.
        quant_min: smallest integer that the value takes.
        quant_max: largest integer that the value takes.
        dtype: of the integers.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The smallest and the largest integer, if they are not just those of the dtype."""
        info = torch.iinfo(self.dtype)
        found = (self.quant_min, self.quant_max)
        return None if found == (info.min, info.max) else found

    def quantize(self, value: float) -> int:
        """The integer that stands for a real number, just as ``qcore::quantize_per_tensor`` gives it."""
        scale, zero_point = torch.tensor(self.scale, dtype=torch.float32), torch.tensor(self.zero_point)
        arguments = (scale, zero_point, self.quant_min, self.quant_max, torch.int32)
        return int(ops.quantize_per_tensor(torch.tensor(value, dtype=torch.float32), *arguments))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers: ``(values - zero_point) * scale``, along ``axis`` if it isn't ``None``."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    @property
    def scale_per_channel(self) -> Tensor:
        """One scale for each output channel (axis 0), also for a weight quantized as a whole."""
        return self.scale if self.axis is not None else self.scale.expand(self.values.shape[0]).clone()


class KernelModule(nn.Module):
    """Base for kernels: plain tensors as state, and what is derived from them made when first needed.

    A subclass registers buffers and defines ``pack``, which gives the function that ``forward`` calls. What is
    packed (a kernel's own weight format, Python numbers) is never copied, pickled or saved; it is made anew after
    ``load_state_dict``, ``deepcopy``, unpickling and ``to``.

    Attributes:
        replayable: that the function computes with torch's operators only, and decides by shapes, strides and dtypes
            at most, never by data. Calls are then recorded and replayed without Python (:mod:`qcore.replay`). A kernel
            that can't promise this says ``replayable = False``, and its whole model runs from Python.
        takes_float: that it rounds inputs of float32. They are cast to it where that loses nothing, and refused
            otherwise; and a gradient through the kernel is an error.
        state_token: another object whenever the state has changed.
    """

    replayable = True
    takes_float = False

    def __init__(self) -> None:
        super().__init__()
        self._packed: Any = None
        self.state_token = object()

    def add_qparams(self, name: str, qparams: QParams) -> None:
        """Register ``{name}_scale`` and ``{name}_zero_point`` as buffers, so that a state_dict is complete."""
        self.register_buffer(f"{name}_scale", torch.tensor(qparams.scale, dtype=torch.float32))
        self.register_buffer(f"{name}_zero_point", torch.tensor(qparams.zero_point))

    def qparams(self, name: str) -> tuple[float, int]:
        """The scale and the zero point that were registered under ``name``, as Python numbers."""
        return float(getattr(self, f"{name}_scale")), int(getattr(self, f"{name}_zero_point"))

    def pack(self) -> Any:
        """The function to call, with all that can be made from the buffers bound to it."""
        raise NotImplementedError(f"{type(self).__name__} must define pack")

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the packed function gives."""
        if is_dynamo_compiling():
            from qcore.replay.apart import apart

            return apart(self.forward, *inputs)  # type: ignore[no-any-return]
        if is_watched() or not are_plain(inputs):
            return watched(self, self.run, inputs, {})  # type: ignore[no-any-return]
        return self.run(*inputs)

    def run(self, *inputs: Tensor) -> Tensor:
        """What the packed function gives, on plain tensors with data."""
        run: Callable[..., Tensor] = self._packed or self.packed()
        if not self.takes_float:
            return run(*inputs)
        needing = needing_gradient(*inputs) if torch.is_grad_enabled() else None
        with torch.no_grad():
            result = run(*map(ops.as_float32, inputs))
        return without_gradient(result, needing)

    def packed(self) -> Any:
        """What ``pack`` gave, made once; no two kernels of a process are packed at the same time."""
        if self._packed is None:
            with PACKING:
                self._packed = self.pack()
        return self._packed

    def __prepare_scriptable__(self) -> nn.Module:
        raise opaque("torch.jit.script")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.unpack()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        # Scales in half precision would be other scales.
        return super()._apply(same_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "forward":  # Models that have recordings hear of it.
            self.unpack()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; and models that have recordings hear of it."""
        handle = super().register_forward_hook(*args, **kwargs)
        look_again()
        return handle

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; and models that have recordings hear of it."""
        handle = super().register_forward_pre_hook(*args, **kwargs)
        look_again()
        return handle

    def unpack(self) -> None:
        """Drop what was packed: the state it was made of changes."""
        self._packed = None
        self.state_token = object()
        look_again()


def with_batch(run: Callable[..., Tensor], rank: int, width: int) -> Callable[..., Tensor]:
    """``run``, whose kernel takes batches only, on inputs with a batch or without.

    Args:
        run: the kernel, which need not look at the shape of its first input: some read on behind a smaller one.
        rank: of an input with a batch, (batch, channels, ...); an input of a linear layer, rank 2, may have more.
        width: the channels.

    Raises:
        ShapeError: when called with an input of another rank or width.
    """

    def batched(*inputs: Tensor) -> Tensor:
        shape = inputs[0].shape
        if len(shape) < rank - 1 or (len(shape) > rank > 2) or shape[1 - rank] != width:
            wanted = f"(..., {width})" if rank == 2 else f"([batch,] {width}{', size' * (rank - 2)})"
            raise ShapeError(
                f"expected a tensor of shape {wanted} as the model was prepared with, found {tuple(shape)}"
            )
        return run(*inputs) if len(shape) >= rank else run(*[x.unsqueeze(0) for x in inputs]).squeeze(0)

    return batched


class WeightKernel(KernelModule):
    """Base for kernels with a weight of int8 around zero: its state.

    Args:
        weight: symmetric; its scale is kept per channel.
        bias: float32.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale_per_channel.to(torch.float32))
        self.register_buffer("bias", bias)

    def extra_repr(self) -> str:
        """The weight's shape."""
        return f"weight={tuple(self.weight.shape)}"
