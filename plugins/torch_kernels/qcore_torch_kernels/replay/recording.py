"""What one call of a function did: the torch operators that it called, in order, as plain data.

Sizes are numbers in a recording, and what Python decided is decided; so it holds for all inputs of the same shapes,
strides and dtypes, as long as nothing was decided by the data in them. Operators that hand data to Python, draw random
numbers, write into what they were given, or give results whose shape depends on data, are refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from qcore.fx.dispatch import DispatchMode

_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SET_STORAGE = torch.ops.aten.set_.source_Storage_storage_offset
_SET_TENSOR = torch.ops.aten.set_.source_Tensor_storage_offset
#: Qparams of quantized tensors are numbers of the model, not data: what would compute them from data is refused.
_READ_QPARAMS = (torch.ops.aten.q_scale.default, torch.ops.aten.q_zero_point.default)
_COMPUTE_QPARAMS = ("aten::quantize_per_tensor_dynamic", "aten::quantize_per_tensor.tensor_qparams")


class NotReplayableError(Exception):
    """A call can't be replayed; says why."""


@dataclass(frozen=True)
class Value:
    """Something that operators read or give: an input, a constant or a result.

    Attributes:
        number: counts up, inputs first.
    """

    number: int


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: the overload.
        args: positional arguments, with a :class:`Value` for every tensor and script object.
        kwargs: keyword arguments, likewise.
        results: what it gave: a :class:`Value`, or a list or tuple of them.
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
        constants: tensors and script objects that it took from elsewhere, with their values.
        calls: in order.
        leaves: of the result: a :class:`Value` for each tensor, anything else as it is.
        structure: of the result.
    """

    inputs: tuple[Value, ...]
    constants: tuple[tuple[Value, Any], ...]
    calls: tuple[Call, ...]
    leaves: tuple[Any, ...]
    structure: TreeSpec

    @property
    def results(self) -> tuple[Value, ...]:
        """The tensors of the result."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Value))

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The result with these tensors in it."""
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Value) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)


def values_read(call: Call) -> list[Value]:
    """What a call reads, in order."""
    found: list[Value] = []

    def look(argument: Any) -> None:
        if isinstance(argument, Value):
            found.append(argument)
        elif isinstance(argument, (tuple, list)):
            for entry in argument:
                look(entry)

    look((call.args, tuple(call.kwargs.values())))
    return found


def values_given(call: Call) -> Sequence[Value]:
    """What a call gives, in order."""
    return [call.results] if isinstance(call.results, Value) else list(call.results)


def last_reads(recording: Recording) -> dict[Value, int]:
    """The number of the last call that reads or gives a value, for what isn't a constant or a result."""
    last: dict[Value, int] = {}
    for number, call in enumerate(recording.calls):
        last.update(dict.fromkeys((*values_read(call), *values_given(call)), number))
    for value in (*(value for value, _ in recording.constants), *recording.results):
        last.pop(value, None)
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


@dataclass
class _Memory:
    """What is known of a storage.

    Attributes:
        storage: a reference, which keeps its place from being taken by a later one.
        lodgers: the value that shows it in some way, by that way; the first one first.
    """

    storage: StorageWeakRef
    lodgers: dict[Any, Value]


class _Recorder(DispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = 0
        self.values = WeakIdKeyDictionary()
        self.constants: list[tuple[Value, Any]] = []
        self.calls: list[Call] = []
        self.given: set[int] = set()
        self.memories: dict[int, _Memory] = {}
        self.shared: set[Value] = set()
        self.inputs = tuple(self.new(tensor) for tensor in inputs)
        for tensor in inputs:
            self.given.add(_storage(tensor))

    def new(self, thing: Any) -> Value:
        """The value that a tensor or script object is from now on: a first one, or another after a change in place."""
        before = self.values.get(thing)
        value = self.values[thing] = Value(self.count)
        self.count += 1
        storage = _storage(thing)
        if storage:
            if storage not in self.memories:
                self.memories[storage] = _Memory(StorageWeakRef(thing.untyped_storage()), {})
            lodgers = self.memories[storage].lodgers
            if before in lodgers.values():  # Changed in place, perhaps to other qparams.
                lodgers.clear()
            lodgers[_appearance(thing)] = value
        return value

    def known(self, thing: Tensor) -> Value | None:
        """The value of a tensor that shows the same memory in the same way."""
        memory = self.memories.get(_storage(thing))
        return memory.lodgers.get(_appearance(thing)) if memory else None

    def forget(self, function: Any, thing: Tensor) -> None:
        """A tensor is going to show other memory, or the same in another way."""
        value = self.values.get(thing)
        if value in self.shared:
            raise NotReplayableError(f"{function} changes the shape of a tensor that stands for two")
        memory = self.memories.get(_storage(thing))
        lodgers = memory.lodgers if memory else {}
        for appearance in [appearance for appearance, lodger in lodgers.items() if lodger == value]:
            del lodgers[appearance]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _READ_QPARAMS:
            return function(*args)
        if function is torch.ops.aten.lift_fresh.default:
            # A tensor that Python made of numbers: a fresh one at each call, which the caller may write into.
            made = function(*args)
            self.calls.append(Call(torch.ops.aten.clone.default, (self.read(made.clone()),), {}, self.new(made)))
            return made
        if function is torch.ops.aten.view.dtype:
            # TorchScript doesn't know it: said with a shell around the same memory.
            seen = function(*args, **kwargs)
            shell = torch.ops.aten.empty.memory_format, ([0],), {"dtype": seen.dtype, "device": seen.device}
            place = args[0].untyped_storage(), seen.storage_offset(), seen.shape, seen.stride()
            made = self.__torch_dispatch__(shell[0], types, *shell[1:])
            return self.__torch_dispatch__(_SET_STORAGE, types, (made, *place))
        if function is _SET_STORAGE:
            function, args = _SET_TENSOR, (args[0], self.row(args[1]), *args[2:])
        if torch.Tag.inplace_view in getattr(function, "tags", ()):
            self.forget(function, args[0])
        self.refuse_what_differs(function, args, kwargs)
        read = self.read(args), {name: self.read(value) for name, value in kwargs.items()}
        results = function(*args, **kwargs)
        if function is _SET_TENSOR:
            known = self.known(results)
            if known is not None:
                # A tensor was unwrapped and is wrapped once more: it is the same, and the recording says it once.
                self.values[results] = known
                self.shared.add(known)
                return results
        self.calls.append(Call(function, *read, self.given_back(function, results)))
        return results

    def row(self, storage: Any) -> Tensor:
        """What stands for a storage, which no recording can hold: a row of all its elements.

        The recording makes it of the first value that showed this memory, so that none between the two need be made for
        it. Here bytes do: which elements they form doesn't matter to those who take the storage.
        """
        memory = self.memories.get(storage._cdata)
        if memory is None or not memory.lodgers:
            raise NotReplayableError("an operator takes memory that belongs to no tensor of the call")
        (_, (dtype, *_), *_), first = next(iter(memory.lodgers.items()))
        size = [storage.nbytes() // dtype.itemsize]
        row = torch.empty(0, dtype=torch.uint8).set_(storage)
        value = self.values[row] = Value(self.count)
        self.count += 1
        self.calls.append(Call(torch.ops.aten.as_strided.default, (first, size, [1], 0), {}, value))
        return row

    def read(self, argument: Any) -> Any:
        """An argument, with values in the place of tensors."""
        if isinstance(argument, (tuple, list)):
            return type(argument)(self.read(entry) for entry in argument)
        if isinstance(argument, (Tensor, torch.ScriptObject)):
            found = self.values.get(argument)
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
                if is_written and isinstance(tensor, Tensor) and _is_given(tensor, self):
                    raise NotReplayableError(f"{function} writes into a tensor that the call was given")

    def recording(self, result: Any) -> Recording:
        leaves, structure = tree_flatten(result)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self.read(leaf)
            elif not isinstance(leaf, _LITERALS):
                raise NotReplayableError(f"the result holds a {type(leaf).__name__}")
        leaves = tree_map_only(Tensor, self.read, leaves)
        calls = _living(self.calls, [leaf for leaf in leaves if isinstance(leaf, Value)])
        return Recording(self.inputs, tuple(self.constants), calls, tuple(leaves), structure)


def _storage(thing: Any) -> int:
    """What tells storages apart; 0 for what has none, such as a packed weight."""
    if not isinstance(thing, Tensor) or thing.layout is not torch.strided:
        return 0
    return int(thing.untyped_storage()._cdata)


def _appearance(thing: Tensor) -> Any:
    """How a tensor shows its storage: two tensors on one storage that agree in this are the same to every operator."""
    # A backend's twin of a tensor is neither a view nor part of a graph; a conjugate or a leaf isn't just its memory.
    flags = thing.requires_grad, thing.is_conj(), thing.is_neg()
    shape = thing.dtype, thing.storage_offset(), thing.shape, thing.stride()
    if not thing.is_quantized:
        return flags, shape
    if thing.qscheme() is not torch.per_tensor_affine:
        return flags, shape, object()
    return flags, shape, thing.q_scale(), thing.q_zero_point()


def _living(calls: Sequence[Call], results: Sequence[Value]) -> tuple[Call, ...]:
    """The calls of whose doing anything is left: that write into something, or whose results are read."""
    read, living = set(results), []
    for call in reversed(calls):
        writes = call.operator._schema.is_mutable and call.operator is not _SET_TENSOR
        if writes or not read.isdisjoint(values_given(call)):
            read.update(values_read(call))
            living.append(call)
    return tuple(reversed(living))


def _is_given(tensor: Tensor, recorder: _Recorder) -> bool:
    return tensor not in recorder.values or _storage(tensor) in recorder.given


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
