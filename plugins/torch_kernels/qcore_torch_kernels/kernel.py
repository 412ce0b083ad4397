"""What kernels of any backend are made of: qparams, integer weights, and modules around a native function.

A kernel's state is plain tensors, and all that depends on calibration or weights is in it. What a native function takes
besides (packed weights, Python numbers, bounds) is made of them when first needed, and again whenever they change.
"""

import threading
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from qcore import ops
from qcore.dtypes import same_dtype
from qcore.errors import ShapeError
from qcore.fx.callers import are_plain, is_watched, needing_gradient, opaque, outside, watched, without_gradient
from qcore.lowering import QParams, QuantizedWeight
from qcore_torch_kernels.replay.executor import look_again
from qcore_torch_kernels.sums import check_sums

#: Packing may need a setting of the process (torch's quantized engine), whichever backend does it: one at a time.
PACKING = threading.RLock()


class _State(dict[str, "Tensor | None"]):
    """A kernel's buffers, of which every change is counted.

    Each tensor in it has its version counter, which torch raises with every write in place, in common with one tensor
    that stands for them all: at each call a single number is looked at. An assignment raises it, too. A tensor from
    elsewhere is copied, as writes into it would be counted elsewhere.

    Args:
        counter: the tensor; ``detach`` gives others with its version counter.
        state: the buffers, which become part of it as they are.
    """

    def __init__(self, counter: Tensor, state: dict[str, "Tensor | None"]) -> None:
        super().__init__((name, None if value is None else _counted(counter, value)) for name, value in state.items())
        self.counter = counter

    def __setitem__(self, name: str, value: "Tensor | None") -> None:
        before = None if value is None or value.is_inference() else value._version
        increment_version(self.counter)
        if value is not None and (before is None or before == value._version):
            with torch.inference_mode(False):
                value = _counted(self.counter, value.detach().clone())
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        increment_version(self.counter)

    def pop(self, name: str, *default: Any) -> Any:
        """As a dict's."""
        increment_version(self.counter)
        return super().pop(name, *default)

    # Those of a dict wouldn't come by what is above.
    update, setdefault = MutableMapping.update, MutableMapping.setdefault
    popitem, clear = MutableMapping.popitem, MutableMapping.clear


def _counted(counter: Tensor, value: Tensor) -> Tensor:
    """The same memory as a tensor whose version counter is that of ``counter``."""
    with torch.inference_mode(False):
        made = counter.detach()
    try:
        made.data = value
    except RuntimeError:  # It holds no numbers (meta, fake), or is a transform's: no kernel computes with it.
        return value
    return made


class KernelModule(nn.Module):
    """Base for kernels: plain tensors as state, and what is derived from them made when first needed.

    A subclass registers buffers and defines ``pack``, which gives the function that ``forward`` calls. What is
    packed (a kernel's own weight format, Python numbers) is never copied, pickled or saved. It is made anew after
    whatever changes the state: ``load_state_dict``, ``to``, an assignment, a write in place. Only what torch itself
    doesn't see (a write through ``.data`` or into a numpy array) must be told by ``unpack``. Everything that depends on
    calibration or weights is made in ``pack``; other attributes are the same for all models of one architecture.

    Attributes:
        replayable: that the function computes with torch's operators only, and decides by shapes, strides and dtypes
            at most, never by data. Calls are then recorded and replayed without Python
            (:mod:`qcore_torch_kernels.replay`). A kernel that can't promise this says ``replayable = False``, and its
            whole model runs from Python.
        takes_float: that it rounds inputs of float32. They are cast to it where that loses nothing, and refused
            otherwise; and a gradient through the kernel is an error.
        state_counter: its version rises whenever the state changes; the kernels of a model have one.
    """

    replayable = True
    takes_float = False
    state_counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode(False):
            self.share_counter(torch.empty(0))
        self._ranges: dict[str, QParams] = {}

    def share_counter(self, counter: Tensor) -> None:
        """Let another tensor count the changes of the state; as long as nobody else has the buffers."""
        self.state_counter = counter
        self._packed: tuple[int, Any] = (-1, None)
        self.__dict__["_buffers"] = _State(counter, self._buffers)

    def add_qparams(self, name: str, qparams: QParams) -> None:
        """Register ``{name}_scale`` and ``{name}_zero_point`` as buffers, so that a state_dict is complete."""
        self.register_buffer(f"{name}_scale", torch.tensor(qparams.scale, dtype=torch.float32))
        self.register_buffer(f"{name}_zero_point", torch.tensor(qparams.zero_point))
        self._ranges[name] = qparams

    def qparams(self, name: str) -> tuple[float, int]:
        """The scale and the zero point that were registered under ``name``, as Python numbers."""
        return float(getattr(self, f"{name}_scale")), int(getattr(self, f"{name}_zero_point"))

    def bounds(self, name: str) -> tuple[int, int] | None:
        """The ends of the integers of ``name``, with the qparams as they are; ``None``: just those of the dtype."""
        scale, zero_point = self.qparams(name)
        return replace(self._ranges[name], scale=scale, zero_point=zero_point).bounds

    def check_state(self) -> None:
        """Raise an error of qcore's if the kernel would compute something wrong with its state; before it is packed."""

    def pack(self) -> Any:
        """The function to call, with all that can be made from the buffers bound to it."""
        raise NotImplementedError(f"{type(self).__name__} must define pack")

    def forward(self, *inputs: Any) -> Tensor:
        """What the packed function gives."""
        if is_dynamo_compiling():
            return outside()(self.forward, *inputs)  # type: ignore[no-any-return]
        if is_watched() or not are_plain(inputs):
            return watched(self, self.run, inputs, {})  # type: ignore[no-any-return]
        return self.run(*inputs)

    def run(self, *inputs: Tensor) -> Tensor:
        """What the packed function gives, on plain tensors with data."""
        version, run = self._packed
        if version != self.state_counter._version:
            run = self.packed()
        if not self.takes_float:
            found: Tensor = run(*inputs)
            return found
        needing = needing_gradient(*inputs) if torch.is_grad_enabled() else None
        with torch.no_grad():
            result = run(*map(ops.as_float32, inputs))
        return without_gradient(result, needing)  # type: ignore[no-any-return]

    def packed(self) -> Any:
        """What ``pack`` gave, made once for a state; no two kernels of a process are packed at the same time."""
        with PACKING:
            # Read before: what another thread loads meanwhile is packed at the next call.
            version = self.state_counter._version
            if self._packed[0] != version:
                self.check_state()
                # By a twin on the same tensors: what it gives may hold it, and what holds itself isn't freed.
                twin = type(self).__new__(type(self))
                vars(twin).update(vars(self), _packed=(-1, None))
                self._packed = (version, twin.pack())
            return self._packed[1]

    def unpack(self) -> None:
        """Drop what was packed: the state changed in a way that torch doesn't count."""
        self._packed = (-1, None)
        increment_version(self.state_counter)

    def __prepare_scriptable__(self) -> nn.Module:
        raise opaque("torch.jit.script")

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: None if value is None else value.detach() for name, value in self._buffers.items()}
        return {**self.__dict__, "_packed": (-1, None), "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.share_counter(self.state_counter)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and name in self.__dict__.get("_buffers", ()):
            value = value.detach()  # Else torch would make a Parameter of the buffer.
        super().__setattr__(name, value)
        if name == "forward":  # Models that have recordings hear of it.
            self.unpack()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for name, value in list(self._buffers.items()):  # Torch can be told to swap tensors rather than to copy.
            self._buffers[name] = value

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Scales in half precision would be other scales.
        return super()._apply(same_dtype(fn), recurse)  # type: ignore[no-untyped-call]

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
        weight: symmetric.
        bias: float.

    Attributes:
        input_max: the largest integer that the activation takes.
        keeps_scale: whether one scale for the whole weight is kept so, not as one for each channel.
        out_axis: of the weight's output channels.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_max = 255
    keeps_scale = False
    out_axis = 0

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.values)
        scale = weight.scale if self.keeps_scale else weight.scale_per_channel
        self.register_buffer("weight_scale", scale.to(torch.float32))
        self.register_buffer("bias", None if bias is None else bias.to(torch.float32))

    def check_state(self) -> None:
        """A weight may be loaded that no rule has seen.

        Raises:
            LoweringError: its sums could leave 32 bits.
        """
        check_sums(self.weight, self.input_max, self.out_axis)

    def extra_repr(self) -> str:
        """The weight's shape."""
        return f"weight={tuple(self.weight.shape)}"
