"""How a batch of somebody's data loader becomes a call of the model."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qcore.errors import ConfigError

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_CONTAINERS = (tuple, list, Mapping)

_PICK = "say how to pick the model's inputs: calibrate(prepared, batches, inputs=lambda batch: {})"


@dataclass(frozen=True)
class InputConvention:
    """How the model was called on the example inputs.

    Attributes:
        inputs: how many arguments it got.
        starts_with_container: whether the first of them was a tuple, a list or a mapping.
        positions: how many arguments its forward takes by position; ``None`` if any number.
        names: the names by which its forward takes arguments; ``None`` if any.
    """

    inputs: int
    starts_with_container: bool
    positions: int | None
    names: tuple[str, ...] | None

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "InputConvention":
        """The convention of ``model(*args, **kwargs)``."""
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):  # A forward that isn't Python.
            parameters = [inspect.Parameter(kind.name, kind) for kind in _ANY]
        kinds = [parameter.kind for parameter in parameters]
        return InputConvention(
            len(args) + len(kwargs),
            bool(args) and isinstance(args[0], _CONTAINERS),
            None if _ANY[0] in kinds else sum(kind in _BY_POSITION for kind in kinds),
            None if _ANY[1] in kinds else tuple(p.name for p in parameters if p.kind in _BY_NAME),
        )

    def call(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments that a batch stands for.

        Mappings, and named tuples of the forward's names, go by name; tuples and lists by position; anything else is
        the one argument. A last entry for which the forward has no parameter is the target that data loaders give.

        Raises:
            ConfigError: what in the batch is input can't be told.
        """
        if isinstance(batch, Mapping):
            return (), self.by_name(batch)
        if not isinstance(batch, (tuple, list)):
            return (batch,), {}
        fields = getattr(batch, "_fields", ())
        if fields and self.names is not None and set(fields) <= set(self.names):
            return (), dict(zip(fields, batch, strict=True))
        has_inputs_apart = len(batch) == 2 and isinstance(batch[0], _CONTAINERS)
        if has_inputs_apart and not self.starts_with_container:
            return self.call(batch[0])
        if len(batch) <= self.inputs or self.positions is None:
            return tuple(batch), {}
        has_target = len(batch) == self.inputs + 1 and self.inputs == self.positions
        if has_target and (has_inputs_apart or not self.starts_with_container):
            return tuple(batch[:-1]), {}
        raise ConfigError(
            f"a batch is a {type(batch).__name__} of {len(batch)}, the model was prepared with {self.inputs} arguments "
            f"and its forward takes {self.positions}: which entries are inputs can't be told; "
            f"{_PICK.format('batch[0]')}"
        )

    def by_name(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments that a mapping stands for."""
        names = batch if self.names is None else self.names
        unknown = [name for name in batch if name not in names]
        if unknown:
            known = [name for name in batch if name in names]
            pick = f"{{name: batch[name] for name in {known}}}" if known else "batch[...]"
            raise ConfigError(
                f"a batch holds {', '.join(map(repr, unknown))}, and the model's forward takes "
                f"{', '.join(names) or 'nothing by name'}; {_PICK.format(pick)}"
            )
        return dict(batch)


#: For a model of which nothing is known: every entry of a batch is an argument.
ANY_CONVENTION = InputConvention(0, True, None, None)
