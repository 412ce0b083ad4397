"""What a traced forward leaves on its modules: values of the graph, and counts, are state, which a graph can't keep."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qcore.fx.graph_module import modules_of
from qcore.fx.values import UndecidableError, values_in

_MODULE_STATE = frozenset(vars(nn.Module()))
_NUMBERS = frozenset({int, float, bool})
_PLAIN = frozenset({type(None), str, torch.dtype, torch.device, torch.Size})


def refuse_state(model: nn.Module, twins: Mapping[int, Any]) -> None:
    """Look what a forward that was traced on a twin of a model has set.

    Args:
        model: as it was.
        twins: what stood for each of its modules, by identity.

    Raises:
        UndecidableError: it keeps something for later calls.
    """
    for module in modules_of(model):
        twin = twins.get(id(module))
        if not isinstance(twin, nn.Module) or isinstance(twin, torch.jit.ScriptModule):
            continue  # No traced forward sets anything in the latter.
        before = vars(module)
        for name, value in (*vars(twin).items(), *twin._parameters.items(), *twin._buffers.items()):
            if name not in _MODULE_STATE and _is_state(before.get(name), value):
                raise UndecidableError(
                    f"it keeps a value of this call in {type(module).__name__}.{name} for later calls"
                )


def _is_state(before: Any, value: Any) -> bool:
    """Whether what a forward sets is more than a note of what it found."""
    kind = type(value)
    if kind in _NUMBERS:
        return type(before) in _NUMBERS and value is not before and bool(value != before)
    return kind not in _PLAIN and kind is not torch.Tensor and kind is not nn.Parameter and bool(values_in(value))
