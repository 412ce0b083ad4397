"""A recording as TorchScript graphs, which torch's interpreter runs without Python.

From Python a call of an operator costs some 10 to 20 us, most of it to turn arguments into torch's own values; there,
they are. Nothing is compiled from source: the graph is built, node by node, through the interface that torch's own
tracer uses. Where a torch doesn't have it any more, ``straight_line.py`` does the same in Python.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcore_torch_kernels.replay.recording import (
    NotReplayableError,
    Recording,
    Register,
    Step,
    last_reads,
    registers_given,
    registers_read,
)

#: Calls in one graph; what TorchScript does with a graph takes time by the square of its length.
MAX_STEPS = 256

_MEMORY_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}  # As c10 numbers them.

Function = Callable[..., Sequence[Tensor]]


def is_available() -> bool:
    """Whether this torch can build and run such a graph."""
    return hasattr(torch._C, "Graph") and hasattr(torch._C, "_create_function_from_graph")


def as_torchscript(recording: Recording, live: Sequence[Tensor] = ()) -> Function:
    """A function of the recording's inputs that gives its result's tensors.

    Args:
        recording: of a call.
        live: tensors that may be written into between calls.

    Raises:
        NotReplayableError: TorchScript doesn't know one of the operators, or can't take an argument.
    """
    constants = dict(recording.constants)
    fixed = _fixed(recording, constants, live)
    if len(recording.steps) <= MAX_STEPS:
        return _graph(recording.steps, recording.inputs, constants, fixed, recording.results)
    stretches = _stretches(recording, constants, fixed)

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        values = {**constants, **dict(zip(recording.inputs, tensors, strict=True))}
        for stretch in stretches:
            found = stretch.run(*[values[register] for register in stretch.reads])
            for register in stretch.dead:  # Memory is given back as early as in the model itself, or nearly.
                del values[register]
            values.update(zip(stretch.gives, found, strict=True))
        return [values[register] for register in recording.results]

    return run


@dataclass(frozen=True)
class _Stretch:
    """A graph of some steps in a row.

    Attributes:
        run: gives the tensors of ``gives`` for those of ``reads``.
        reads: registers that earlier steps gave, and inputs.
        gives: registers that later steps read.
        dead: registers among ``reads`` that no later step reads.
    """

    run: Function
    reads: tuple[Register, ...]
    gives: tuple[Register, ...]
    dead: tuple[Register, ...]


def _fixed(recording: Recording, constants: Mapping[Register, Any], live: Sequence[Tensor]) -> Set[Register]:
    """The constants that can be constants of a graph; others are passed at each call.

    TorchScript takes constants with equal values for one, which one that may change mustn't be; and what is computed of
    constants alone it computes once, though the caller may write into a result.
    """
    places = {id(tensor) for tensor in live}
    fixed = {register for register, constant in constants.items() if id(constant) not in places}
    # It takes none of those that require gradients.
    fixed -= {register for register in fixed if getattr(constants[register], "requires_grad", False)}
    known = set(constants)
    for step in recording.steps:
        if known.issuperset(registers_read(step)):
            fixed.difference_update(registers_read(step))
            known.update(registers_given(step))
    return fixed.difference(recording.results)


def _stretches(recording: Recording, constants: Mapping[Register, Any], fixed: Set[Register]) -> list[_Stretch]:
    last, results = last_reads(recording), set(recording.results)
    made = []
    for start in range(0, len(recording.steps), MAX_STEPS):
        steps = recording.steps[start : start + MAX_STEPS]
        end = start + len(steps)
        given = dict.fromkeys(register for step in steps for register in registers_given(step))
        read = dict.fromkeys(register for step in steps for register in registers_read(step))
        reads = tuple(register for register in read if register not in given and register not in constants)
        gives = tuple(register for register in given if register in results or last[register] >= end)
        dead = tuple(register for register in reads if register not in results and last[register] < end)
        made.append(_Stretch(_graph(steps, reads, constants, fixed, gives), reads, gives, dead))
    return made


def _graph(
    steps: Sequence[Step],
    inputs: Sequence[Register],
    constants: Mapping[Register, Any],
    fixed: Set[Register],
    results: Sequence[Register],
) -> Function:
    builder = _Builder()
    for register in inputs:
        builder.add_input(register)
    used = dict.fromkeys((*(register for step in steps for register in registers_read(step)), *results))
    own = []
    for register in used:
        if register in fixed:
            builder.values[register] = builder.constant(constants[register])
        elif register in constants:
            builder.add_input(register, constants[register])
            own.append(constants[register])
    for step in steps:
        builder.add_step(step)
    function = builder.finish(results)
    # An argument that is passed at each call takes time each time: there may be hundreds of them.
    return (lambda *given: function(*given, *own)) if own else function


class _Builder:
    def __init__(self) -> None:
        self.graph: Any = torch._C.Graph()
        self.values: dict[Register, torch._C.Value] = {}

    def add_input(self, register: Register, constant: Any = None) -> None:
        made = self.values[register] = self.graph.addInput()
        if isinstance(constant, torch.ScriptObject):
            made.setType(constant._type())

    def add_step(self, step: Step) -> None:
        schema = step.operator._schema
        given = dict(zip((argument.name for argument in schema.arguments), step.args, strict=False)) | step.kwargs
        inputs = [
            self.argument(given.get(argument.name, argument.default_value), argument.type)
            for argument in schema.arguments
        ]
        node = self.graph.create(schema.name, inputs, len(schema.returns))
        self.graph.insertNode(node)
        outputs = list(node.outputs())
        for output, returned in zip(outputs, schema.returns, strict=True):
            output.setType(returned.type)
        # It looks for an overload by the types of the arguments. A number in the place of a tensor has one of its own.
        has_numbers = any(
            isinstance(argument.type, torch._C.TensorType) and isinstance(given.get(argument.name), (int, float))
            for argument in schema.arguments
        )
        if node.schema() != str(schema) and not has_numbers:
            raise NotReplayableError(f"TorchScript doesn't find {step.operator}")
        if isinstance(step.results, list) and len(outputs) == 1:
            unpack = self.graph.create("prim::ListUnpack", [outputs[0]], len(step.results))
            self.graph.insertNode(unpack)
            outputs = list(unpack.outputs())
        self.values.update(zip(registers_given(step), outputs, strict=True))

    def argument(self, value: Any, kind: Any) -> torch._C.Value:
        """An argument as a value of the graph."""
        if isinstance(value, Register):
            return self.values[value]
        if isinstance(kind, torch._C.OptionalType):
            return self.argument(value, kind.getElementType()) if value is not None else self.constant(None)
        if isinstance(value, (tuple, list)) != isinstance(kind, torch._C.ListType):
            raise NotReplayableError(f"TorchScript takes no {type(value).__name__} as {kind}")
        if isinstance(value, (tuple, list)):
            entries = [self.argument(entry, kind.getElementType()) for entry in value]
            return self.list_of(entries, kind.getElementType())
        if isinstance(value, int) and isinstance(kind, torch._C.FloatType):
            value = float(value)
        known: Any = _MEMORY_FORMATS.get(value, value) if isinstance(value, torch.memory_format) else value
        return self.constant(known)

    def constant(self, value: Any) -> torch._C.Value:
        if isinstance(value, Tensor):  # Of those that have no storage, such as packed weights, it can't say itself.
            node = self.graph.insertNode(self.graph.create("prim::Constant", [], 1))
            return node.t_("value", value).output()  # type: ignore[no-any-return]
        made: torch._C.Value = self.graph.insertConstant(value)
        return made

    def list_of(self, entries: Sequence[torch._C.Value], kind: Any) -> torch._C.Value:
        node = self.graph.create("prim::ListConstruct", list(entries), 1)
        node.output().setType(torch._C.ListType(kind))
        self.graph.insertNode(node)
        made: torch._C.Value = node.output()
        return made

    def finish(self, results: Sequence[Register]) -> Any:
        """The function, which gives a list."""
        tensors = self.list_of([self.values[value] for value in results], torch._C.TensorType.get())
        self.graph.registerOutput(tensors)
        return torch._C._create_function_from_graph("replay", self.graph)
