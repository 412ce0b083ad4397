"""Which recording stands for which call of a converted model.

The first call of a kind (shapes, strides and dtypes of the tensors, everything else by value) runs as it is written.
The second is recorded, and the recording must give the same to the last bit before it is used from the third on.
Whatever a recording can't know (hooks, gradients, tracing, other weights, a kernel packed anew) sends a call back to
the model.
"""

import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _torch_module
from torch.utils._pytree import tree_leaves

from qcore.fx.callers import is_watched
from qcore.fx.calls import NOTHING, Runner, threads_as_written
from qcore.fx.graph_module import QGraphModule
from qcore_torch_kernels.replay import torchscript
from qcore_torch_kernels.replay.memory import keep_freed_memory
from qcore_torch_kernels.replay.recording import NotReplayableError, Recording, record
from qcore_torch_kernels.replay.straight_line import as_function

#: How many kinds of calls a model keeps recordings of; further ones run as they are written. A recording costs as much
#: as some ten calls, so with ever new kinds it wouldn't pay to let old ones go.
MAX_KINDS = 16

_STRIDED = torch.strided
_LITERALS = (type(None), bool, int, float, str)
_LIBRARIES = frozenset(("torch", "_operator", "math", "builtins", "qcore"))
#: Methods that hand data to Python without an operator that a recording would see.
_READ_DATA = frozenset(("tolist", "numpy", "data_ptr", "untyped_storage", "storage"))

_generation = 0

_version_of = attrgetter("_version")


def look_again() -> None:
    """Some kernel has a new hook; whatever has recordings asks its own kernels whether it is theirs."""
    global _generation
    _generation += 1


@dataclass(frozen=True)
class _Program:
    """A proven recording.

    Attributes:
        run: gives the tensors of the result.
        recording: of what.
        is_single: whether the result is one tensor and nothing else.
        requires_grad: whether autograd would have to know of a call.
    """

    run: Callable[..., Any]
    recording: Recording
    is_single: bool
    requires_grad: bool


class Executor(Runner):
    """Runs one converted graph, and replays what was recorded of its calls."""

    def __init__(self, module: QGraphModule, forward: Callable[..., Any]) -> None:
        super().__init__(module, forward)
        self.generation = -1
        self.is_replayable = False
        self.training = module.training
        self.programs: dict[Any, _Program | None] = {}
        self.seen: set[Any] = set()
        self.hooks: list[dict[Any, Any]] = []
        self.kernel_hooks: list[dict[Any, Any]] = []
        self.is_kernel_hooked = False
        self.state: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self.counters: list[Tensor] = []
        self.versions: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        found = self.at_once(args, kwargs)
        if found is not NOTHING:
            return found
        key, tensors = self.key(args, kwargs)
        if key is None:
            return super().__call__(*args, **kwargs)
        if key in self.programs:
            return self.run(*args, **kwargs)
        return self.run_unknown(key, args, kwargs, tensors)

    def at_once(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's result, if there is a recording of such a call, else ``NOTHING``."""
        key, tensors = self.key(args, kwargs)
        program = self.programs.get(key)
        if program is None or (program.requires_grad and torch.is_grad_enabled()):
            return NOTHING
        found = program.run(*tensors)
        return found[0] if program.is_single else program.recording.result(found)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What tells kinds of calls apart, ``None`` for one that must run as it is written; and the call's tensors."""
        tensors: list[Tensor] = []
        if is_watched() or (threads_as_written and threading.get_ident() in threads_as_written):
            return None, tensors
        self.look()
        if not self.is_replayable or self.has_hooks():
            return None, tensors
        return _key_of_call(args, kwargs, tensors), tensors

    def look(self) -> None:
        """Drop the recordings if the module isn't what it was."""
        generation = _generation
        if generation != self.generation:
            if self.generation < 0:
                self.start_anew()
            self.is_kernel_hooked = any(self.kernel_hooks)
            self.generation = generation
        if self.module.training is not self.training or list(map(_version_of, self.counters)) != self.versions:
            self.start_anew()
        for registry, values in self.state:
            if len(registry) != len(values) or not all(map(is_, registry.values(), values)):
                self.start_anew()
                return

    def has_hooks(self) -> bool:
        """Whether any module has one. A kernel tells when it gets one, but not when it is rid of it."""
        self.is_kernel_hooked = self.is_kernel_hooked and any(self.kernel_hooks)
        return self.is_kernel_hooked or any(self.hooks)

    @property
    def replayed_kinds(self) -> int:
        """For how many kinds of calls there is a recording that was proven."""
        return sum(program is not None for program in self.programs.values())

    def start_anew(self) -> None:
        """Look at the module as it is now."""
        modules = list(self.module.modules())
        # A kernel says itself when its state or its hooks change. Of whatever else there is, every attribute may count.
        kernels = [module for module in modules if hasattr(module, "state_counter")]
        others = [module for module in modules if not hasattr(module, "state_counter")]
        # What lowering made has one counter. The versions are read first: what changes from here on counts.
        counters: list[Any] = list({id(kernel.state_counter): kernel.state_counter for kernel in kernels}.values())
        versions = list(map(_version_of, counters))
        # Others: a thread that records now must not write into what comes after.
        self.programs, self.seen = {}, set()
        self.counters, self.versions = counters, versions
        self.is_replayable = _is_replayable(self.module)
        self.kernel_hooks, self.hooks = _hooks_of(kernels), _hooks_of(others)
        self.hooks += [_torch_module._global_forward_hooks, _torch_module._global_forward_pre_hooks]
        registries: list[dict[str, Any]] = [module._modules for module in modules]
        for module in modules:
            if not hasattr(module, "replayable"):
                registries += [module._parameters, module._buffers]
                registries += [vars(module)] if module is not self.module else []
        self.state = [(registry, tuple(registry.values())) for registry in registries if registry]
        self.training = self.module.training

    def run_unknown(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """A call for which there is no program: note its kind, or record it if the kind was noted before."""
        programs, seen = self.programs, self.seen
        is_full = len(programs) >= MAX_KINDS
        if key not in seen and not is_full:
            result = self.run(*args, **kwargs)
            if len(seen) >= 16 * MAX_KINDS:
                seen.clear()
            seen.add(key)  # Not before: a call in another thread would be recorded while kernels are still packed.
            return result
        is_odd = any(tensor.is_quantized for tensor in tensors)
        if is_full or is_odd or key in programs or self.needs_gradients(args, kwargs):
            return self.run(*args, **kwargs)
        programs[key] = None  # Until it is proven, and for good if it isn't.
        try:
            result, recording = record(lambda: self.forward(self.module, *args, **kwargs), tensors)
        except NotReplayableError:
            return self.run(*args, **kwargs)
        except BaseException:  # The call's own error, or an interruption, says nothing of the kind.
            programs.pop(key, None)
            raise

        def again(tensors: list[Tensor]) -> Any:
            remaining = iter(tensors)
            return self.forward(self.module, *_with(args, remaining), **_with(kwargs, remaining))

        live = [value for _, values in self.state for value in values if isinstance(value, Tensor)]
        program = _proven(recording, result, tensors, again, live)
        if program is not None:
            keep_freed_memory()
            programs[key] = program
        return result


class _UnknownKeyError(Exception):
    """An argument that isn't known well enough."""


def _key_of_call(args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """What must be the same for a recording to hold, or ``None``; collects the tensors."""
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].layout is _STRIDED:
        tensors.append(args[0])  # Most calls are such.
        return _key_of_tensor(args[0])
    try:
        key = _key((args, kwargs) if kwargs else args, tensors)
    except _UnknownKeyError:
        return None
    # A tensor that is given twice could be two tensors in another call.
    return key if len(tensors) < 2 or len(set(map(id, tensors))) == len(tensors) else None


def _key(value: Any, tensors: list[Tensor]) -> Any:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        if value.layout is not _STRIDED:
            raise _UnknownKeyError
        tensors.append(value)
        return _key_of_tensor(value)
    if kind is tuple or kind is list:
        return kind, tuple([_key(entry, tensors) for entry in value])
    if kind is dict:
        return kind, tuple([(key, _key(entry, tensors)) for key, entry in value.items()])
    if kind in _LITERALS:
        return kind, value
    raise _UnknownKeyError


def _key_of_tensor(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _is_replayable(module: fx.GraphModule) -> bool:
    """Whether all that the graph calls is known to compute with torch's operators, deciding nothing by data."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            if not all(_is_known(inner) for inner in module.get_submodule(str(node.target)).modules()):
                return False
        elif node.op == "call_method":
            if node.target in _READ_DATA:
                return False
        elif node.op == "call_function" and not _is_torch_function(node.target):
            return False
    return True


def _is_known(module: nn.Module) -> bool:
    if "forward" in vars(module):  # Somebody patched it.
        return False
    promised = getattr(module, "replayable", None)
    return type(module).__module__.startswith("torch.nn.") if promised is None else bool(promised)


def _is_torch_function(function: Any) -> bool:
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    home = getattr(function, "__module__", None)
    if home is None:  # So it is with torch's functions that come from C.
        return isinstance(function, types.BuiltinFunctionType)
    return str(home).partition(".")[0] in _LIBRARIES


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Arguments with other tensors, in the order in which ``_key`` finds them."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(_with(entry, tensors) for entry in value)
    if isinstance(value, dict):
        return {key: _with(entry, tensors) for key, entry in value.items()}
    return value


def _hooks_of(modules: list[nn.Module]) -> list[dict[Any, Any]]:
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def _proven(
    recording: Recording,
    expected: Any,
    tensors: list[Tensor],
    again: Callable[[list[Tensor]], Any],
    live: list[Tensor],
) -> _Program | None:
    """The recording as a program, if it gives what the call gave, and what the model gives on other data.

    On other data, because memory that is used again may still hold the right result; and three times, because
    TorchScript goes on changing a graph until it has run twice.
    """
    makers: list[Callable[[Recording], Any]] = []
    if torchscript.is_available():
        makers.append(partial(torchscript.as_torchscript, live=live))
    constants = [constant for _, constant in recording.constants if isinstance(constant, Tensor)]
    requires_grad = any(tensor.requires_grad for tensor in (*tensors, *constants))
    others = [_witness(tensor.detach()) for tensor in tensors]
    with torch.no_grad():
        try:
            expected_of_others = again(others)
        except Exception:  # Whatever a model says of data that it wasn't meant for: there is no second witness then.
            return None
        for make in (*makers, as_function):
            try:
                run = make(recording)
                for inputs, wanted in ((tensors, expected), (others, expected_of_others), (tensors, expected)):
                    if not all(map(_are_same, _tensors(wanted), run(*inputs))):
                        break
                else:
                    return _Program(run, recording, isinstance(expected, Tensor), requires_grad)
            except (NotReplayableError, RuntimeError):
                continue
    return None


def _witness(tensor: Tensor) -> Tensor:
    """A tensor of the same kind with other data, elsewhere in its memory."""
    size, stride = tensor.shape, tensor.stride()
    if not tensor.numel() or any(step == 0 and length > 1 for length, step in zip(size, stride, strict=True)):
        return tensor
    if tensor.is_floating_point():
        pattern = torch.arange(tensor.numel(), device=tensor.device).remainder_(7).to(tensor.dtype).reshape(size)
        other = tensor * 0.75 + pattern * 0.0625
    else:  # Numbers that occur in it, as they may be indices.
        other = tensor.flatten().roll(1).reshape(size)
        if torch.equal(other, tensor):
            other.view(-1)[0] = not other.view(-1)[0]
    offset = 8
    reach = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    return tensor.new_zeros(reach).as_strided(size, stride, offset).copy_(other)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _are_same(first: Tensor, second: Tensor) -> bool:
    # Strides may differ: some of torch's functions choose another way when their operators are watched.
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if first.is_floating_point():
        return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    return torch.equal(first, second)
