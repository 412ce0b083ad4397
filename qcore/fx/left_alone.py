"""A traced forward runs on the user's modules: what it sets on them is put back, and what no graph sets is an error."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qcore.fx.values import UndecidableError, values_in

_MODULE_STATE = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Put back what a traced forward writes into its modules; what a graph wouldn't write is an error."""
    before = [
        (module, [dict(registry) for registry in _registries(module)], _containers(vars(module)))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # No traced forward sets anything there.
    ]
    kept = ""
    try:
        yield
    finally:
        for module, registries, containers in before:
            parameters, buffers, _, attributes = registries
            for known, now in (
                (attributes, vars(module)),
                (parameters, module._parameters),
                (buffers, module._buffers),
            ):
                for name, value in now.items():
                    if known.get(name) is not value and name not in _MODULE_STATE and _is_state(known.get(name), value):
                        kept = f"{type(module).__name__}.{name}"
            if any(values_in(container) for container, _ in containers):
                kept = f"a container of {type(module).__name__}"
            for container, content in containers:
                _refill(container, content)
            for own, saved in zip(_registries(module), registries, strict=True):
                _refill(own, saved)
    if kept:
        raise UndecidableError(f"it keeps a value of this call in {kept} for later calls")


def _is_state(before: Any, value: Any) -> bool:
    """Whether an attribute that a forward sets is more than a note of what it found: a value, or a count."""
    numbers = (int, float, bool)
    return bool(values_in(value)) or (type(value) in numbers and type(before) in numbers and value != before)


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules, vars(module)


def _containers(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The lists and dictionaries among a module's attributes, each with what is in it."""
    found = []
    pending = [v for name, v in attributes.items() if type(v) in (list, dict) and name not in _MODULE_STATE]
    while pending:
        value = pending.pop()
        found.append((value, copy.copy(value)))
        inner = value.values() if isinstance(value, dict) else value
        pending.extend(item for item in inner if type(item) in (list, dict))
    return found


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(content)
    else:
        container.extend(content)
