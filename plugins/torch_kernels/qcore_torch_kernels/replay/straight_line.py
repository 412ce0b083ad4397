"""A recording as a Python function without modules and branches, for torches without TorchScript."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qcore_torch_kernels.replay.recording import Recording, Register, last_reads, registers_given


def as_function(recording: Recording) -> Callable[..., Sequence[Tensor]]:
    """A function of the recording's inputs that gives its result's tensors."""
    space: dict[str, Any] = {_name(register): constant for register, constant in recording.constants}
    dead: dict[int, list[str]] = {}
    for register, number in last_reads(recording).items():
        dead.setdefault(number, []).append(_name(register))
    lines = [f"def replay({', '.join(map(_name, recording.inputs))}):"]
    for number, step in enumerate(recording.steps):
        space[f"f{number}"] = step.operator
        targets = ", ".join(map(_name, registers_given(step)))
        left = targets if isinstance(step.results, Register) else f"[{targets}]"
        arguments = [_written(argument, space) for argument in step.args]
        arguments += [f"{name}={_written(argument, space)}" for name, argument in step.kwargs.items()]
        lines.append(f"    {left} = f{number}({', '.join(arguments)})")
        if number in dead:  # Memory is given back as early as in the model itself.
            lines.append(f"    {' = '.join(dead[number])} = None")
    lines.append(f"    return [{', '.join(map(_name, recording.results))}]")
    exec("\n".join(lines), space)
    return space["replay"]  # type: ignore[no-any-return]


def _name(register: Register) -> str:
    return f"r{register.number}"


def _written(argument: Any, space: dict[str, Any]) -> str:
    """An argument as source text; what has none is put into the function's globals."""
    if isinstance(argument, Register):
        return _name(argument)
    if isinstance(argument, (tuple, list)) and any(isinstance(entry, Register) for entry in argument):
        return f"[{', '.join(_written(entry, space) for entry in argument)}]"
    name = f"k{len(space)}"
    space[name] = argument
    return name
