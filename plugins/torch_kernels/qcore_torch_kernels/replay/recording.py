"""What one call of a function did: the torch operators that it called, in order, as plain data.

Sizes are numbers in a recording, and what Python decided is decided; so it holds for all inputs of the same shapes,
strides and dtypes, as long as nothing was decided by the data in them. Operators that hand data to Python, draw random
numbers, write into what they were given, or give results whose shape depends on data, are refused.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from qcore.fx.dispatch import DispatchMode

_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SET = torch.ops.aten.set_.source_Tensor_storage_offset
#: Qparams of quantized tensors are numbers of the model, not data: what would compute them from data is refused.
_READ_QPARAMS = (torch.ops.aten.q_scale.default, torch.ops.aten.q_zero_point.default)
_COMPUTE_QPARAMS = ("aten::quantize_per_tensor_dynamic", "aten::quantize_per_tensor.tensor_qparams")


class NotReplayableError(Exception):
    """A call can't be replayed; says why."""


@dataclass(frozen=True)
class Register:
    """Where something lies that operators read or give: an input, a constant or a result.

    Attributes:
        number: counts up, inputs first.
    """

    number: int


@dataclass(frozen=True)
class Step:
    """One call of an operator.

    Attributes:
        operator: the overload.
        args: positional arguments, with a :class:`Register` for every tensor and script object.
        kwargs: keyword arguments, likewise.
        results: what it gave: a :class:`Register`, or a list or tuple of them.
    """

    operator: torch._ops.OpOverload[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any


@dataclass(frozen=True)
class Recording:
    """All that a function did.

    Attributes:
        inputs: the tensors that it was given.
        constants: tensors and script objects that it took from elsewhere, with their registers.
        steps: in order.
        leaves: of the result: a :class:`Register` for each tensor, anything else as it is.
        structure: of the result.
    """

    inputs: tuple[Register, ...]
    constants: tuple[tuple[Register, Any], ...]
    steps: tuple[Step, ...]
    leaves: tuple[Any, ...]
    structure: TreeSpec

    @property
    def results(self) -> tuple[Register, ...]:
        """The tensors of the result."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Register))

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The result with these tensors in it."""
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Register) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)


def registers_read(step: Step) -> list[Register]:
    """What a step reads, in order."""
    found: list[Register] = []

    def look(argument: Any) -> None:
        if isinstance(argument, Register):
            found.append(argument)
        elif isinstance(argument, (tuple, list)):
            for entry in argument:
                look(entry)

    look((step.args, tuple(step.kwargs.values())))
    return found


def registers_given(step: Step) -> Sequence[Register]:
    """What a step gives, in order."""
    return [step.results] if isinstance(step.results, Register) else list(step.results)


def last_reads(recording: Recording) -> dict[Register, int]:
    """The number of the last step that reads or gives a register, for what isn't a constant or a result."""
    last: dict[Register, int] = {}
    for number, step in enumerate(recording.steps):
        last.update(dict.fromkeys((*registers_read(step), *registers_given(step)), number))
    for register in (*(register for register, _ in recording.constants), *recording.results):
        last.pop(register, None)
    return last


def record(function: Callable[[], Any], inputs: Sequence[Tensor]) -> tuple[Any, Recording]:
    """Call a function, and note the operators that it calls.

    Args:
        function: the call.
        inputs: the tensors that differ from call to call.

    Returns:
        The function's result and the recording.

    Raises:
        NotReplayableError: with other data in the inputs the function might do something else. The function may have
            run in part.
    """
    recorder = _Recorder(inputs)
    with recorder:
        result = function()
    return result, recorder.recording(result)


@dataclass(frozen=True)
class _Memory:
    """Tensors of one shape and layout that show the same memory, as kernels said when they made them.

    Attributes:
        first: the register of the one that was there first.
        storage: what tells the memory from others.
        shown: the register of each, by how it shows the memory.
    """

    first: Register
    storage: int
    shown: dict[Any, Register]


_recorders = threading.local()


def show(shell: Tensor, source: Tensor) -> Tensor:
    """Let ``shell``, an empty tensor, show the memory of ``source``; and a recording know of it.

    Only so do two tensors on one memory stay one value in a recording, as those of torch's quantized and plain
    operators: what one kernel unwraps and the next wraps again costs nothing then.

    Args:
        shell: a new one without elements; elements of its dtype are as large as those of ``source``.
        source: gives memory, shape and strides.

    Returns:
        ``shell``.
    """
    recorder: _Recorder | None = getattr(_recorders, "active", None)
    return _placed(shell, source) if recorder is None else recorder.show(shell, source)


def _placed(shell: Tensor, source: Tensor) -> Tensor:
    return shell.set_(source.untyped_storage(), source.storage_offset(), source.size(), source.stride())


class _Recorder(DispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = 0
        self.registers = WeakIdKeyDictionary()
        self.constants: list[tuple[Register, Any]] = []
        self.steps: list[Step] = []
        self.memories: dict[Register, _Memory] = {}
        self.is_placing = False
        self.inputs = tuple(self.new(tensor) for tensor in inputs)
        self.given = {_storage(tensor) for tensor in inputs}

    def __enter__(self) -> Self:
        self.outer, _recorders.active = getattr(_recorders, "active", None), self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _recorders.active = self.outer

    def new(self, thing: Any = None) -> Register:
        """The register that a tensor or script object has from now on: a first one, or another after a change."""
        register = Register(self.count)
        self.count += 1
        if thing is not None:
            self.registers[thing] = register
        return register

    def step(self, operator: Any, *args: Any, **kwargs: Any) -> Register:
        """A step that no operator of the call takes; gives the register of its result."""
        register = self.new()
        self.steps.append(Step(operator, args, kwargs, register))
        return register

    def show(self, shell: Tensor, source: Tensor) -> Tensor:
        """See the function of this name."""
        empty = self.registers.get(shell)
        if empty is None or empty in self.memories:
            raise NotReplayableError("a tensor that shows other memory than before stands for two")
        self.is_placing = True
        try:
            _placed(shell, source)
            first, how = self.read(source), _how_it_shows(shell)
            memory = self.memories.get(first)
            if memory is None:
                memory = self.memories[first] = _Memory(first, _storage(source), {_how_it_shows(source): first})
        finally:
            self.is_placing = False
        if how not in memory.shown:
            memory.shown[how] = self.around(empty, memory.first, source, shell)
            self.memories[memory.shown[how]] = memory
        self.registers[shell] = memory.shown[how]
        return shell

    def around(self, empty: Register, memory: Register, source: Tensor, shown: Tensor) -> Register:
        """The steps that make a shell around memory, as no recording can hold a storage.

        Args:
            empty: the shell.
            memory: of what has the memory.
            source: the tensor that ``memory`` stands for, or one of its shape and layout.
            shown: as which the shell shows it.
        """
        row = memory
        if not source.is_contiguous() or source.storage_offset():
            size = [source.untyped_storage().nbytes() // source.itemsize]
            row = self.step(torch.ops.aten.as_strided.default, memory, size, [1], 0)
        return self.step(_SET, empty, row, shown.storage_offset(), [*shown.shape], [*shown.stride()])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_placing or function in _READ_QPARAMS:
            return function(*args, **kwargs)
        if function is torch.ops.aten.lift_fresh.default:
            # A tensor that Python made of numbers: a fresh one at each call, which the caller may write into.
            made = function(*args)
            self.registers[made] = self.step(torch.ops.aten.clone.default, self.read(made.clone()))
            return made
        if function is torch.ops.aten.view.dtype:
            # TorchScript doesn't know it: said with a shell around the same memory.
            seen = function(*args)
            empty = self.step(torch.ops.aten.empty.memory_format, [0], dtype=seen.dtype, device=seen.device)
            self.registers[seen] = self.around(empty, self.read(args[0]), args[0], seen)
            return seen
        if torch.Tag.inplace_view in getattr(function, "tags", ()) and self.registers.get(args[0]) in self.memories:
            raise NotReplayableError(f"{function} changes the shape of a tensor that stands for two")
        self.refuse_what_differs(function, args, kwargs)
        read = self.read(args), {name: self.read(value) for name, value in kwargs.items()}
        results = function(*args, **kwargs)
        self.steps.append(Step(function, *read, self.given_back(function, results)))
        return results

    def read(self, argument: Any) -> Any:
        """An argument, with registers in the place of tensors."""
        if isinstance(argument, (tuple, list)):
            return type(argument)(self.read(entry) for entry in argument)
        if isinstance(argument, (Tensor, torch.ScriptObject)):
            found = self.registers.get(argument)
            if found is None:
                found = self.new(argument)
                self.constants.append((found, argument))
                self.given.add(_storage(argument))
            return found
        if not isinstance(argument, _LITERALS):
            raise NotReplayableError(f"an operator takes a {type(argument).__name__}")
        return argument

    def given_back(self, function: Any, results: Any) -> Any:
        if isinstance(results, Tensor):
            return self.new(results)
        if isinstance(results, (tuple, list)) and all(isinstance(entry, Tensor) for entry in results):
            return type(results)(self.new(entry) for entry in results)
        raise NotReplayableError(f"{function} gives something else than tensors")

    def refuse_what_differs(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Operators that the next call might not call, or that would do something else to it."""
        if not isinstance(function, torch._ops.OpOverload) or function.name() in _COMPUTE_QPARAMS:
            raise NotReplayableError(f"{function} can't be recorded")
        if torch.Tag.nondeterministic_seeded in function.tags and not _drops_nothing(function, args, kwargs):
            raise NotReplayableError(f"{function} draws random numbers")
        if function.name() == "aten::native_batch_norm" and args[5]:
            raise NotReplayableError(f"{function} writes into running statistics")  # Of which its schema says nothing.
        # Indexing has such a shape only where the index is a mask.
        if torch.Tag.dynamic_output_shape in function.tags and not _indexes_by_numbers(function, args):
            raise NotReplayableError(f"the shape of {function} depends on data")
        if not function._schema.is_mutable:
            return
        for place, argument in enumerate(function._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if is_written and isinstance(tensor, Tensor):
                    if tensor not in self.registers or _storage(tensor) in self.given:
                        raise NotReplayableError(f"{function} writes into a tensor that the call was given")
                    self.forget(_storage(tensor))

    def forget(self, storage: int) -> None:
        """Memory is written into: who shows it again must come after that, and in a form that a compiler sees."""
        self.memories = {register: m for register, m in self.memories.items() if m.storage != storage}

    def recording(self, result: Any) -> Recording:
        leaves, structure = tree_flatten(result)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self.read(leaf)
            elif not isinstance(leaf, _LITERALS):
                raise NotReplayableError(f"the result holds a {type(leaf).__name__}")
        leaves = tree_map_only(Tensor, self.read, leaves)
        steps = _living(self.steps, [leaf for leaf in leaves if isinstance(leaf, Register)])
        return Recording(self.inputs, tuple(self.constants), steps, tuple(leaves), structure)


def _storage(thing: Any) -> int:
    """What tells storages apart; 0 for what has none, such as a packed weight."""
    if not isinstance(thing, Tensor) or thing.layout is not torch.strided:
        return 0
    return int(thing.untyped_storage()._cdata)


def _how_it_shows(tensor: Tensor) -> Any:
    if tensor.is_quantized and tensor.qscheme() is not torch.per_tensor_affine:
        raise NotReplayableError("a tensor with qparams for each channel is unwrapped")
    return (tensor.dtype, tensor.q_scale(), tensor.q_zero_point()) if tensor.is_quantized else tensor.dtype


def _living(steps: Sequence[Step], results: Sequence[Register]) -> tuple[Step, ...]:
    """The steps of whose doing anything is left: that write into something, or whose results are read."""
    read, living = set(results), []
    for step in reversed(steps):
        writes = step.operator._schema.is_mutable and step.operator is not _SET
        if writes or not read.isdisjoint(registers_given(step)):
            read.update(registers_read(step))
            living.append(step)
    return tuple(reversed(living))


def _drops_nothing(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers only for a dropout, and has none to do."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given == 0)
    return False


def _indexes_by_numbers(function: Any, args: tuple[Any, ...]) -> bool:
    if function is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])
