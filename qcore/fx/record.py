"""What qcore knows about a model at a stage: one record on every graph, and one on a host that stays Python.

A model is a host with graphs at some paths; one that is a graph as a whole is the case of one graph at the root. Each
graph's record holds the plan of that graph, so a part that somebody takes out of its host is still whole. The host's
holds what was decided outside of all graphs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from qcore.backend_config import BackendConfig
from qcore.dtypes import same_dtype
from qcore.errors import GuardError
from qcore.fx.batches import InputConvention
from qcore.quantization_plan import QuantizationPlan, joined_plan

Stage = Literal["prepared", "reference", "converted"]

#: Where a module keeps its record.
RECORD = "_qcore_record"


@dataclass(frozen=True)
class Settings:
    """What ``prepare_fx`` settled for a model and all its parts.

    Attributes:
        backend: name of the backend.
        backend_config: the capability that the plan was made for.
        is_custom_config: whether the user gave that config; then there is no lowering but the reference's.
        convention: how the model was called on the example inputs.
    """

    backend: str
    backend_config: BackendConfig
    is_custom_config: bool
    convention: InputConvention


@dataclass(frozen=True)
class Record:
    """What qcore knows about one graph of a model, or about the Python around its graphs.

    Attributes:
        stage: what the model is.
        settings: of the whole model.
        plan: the decisions; no pass writes into it.
        preserved: names of attributes of the float module that stay.
        owner: the name of that module's class.
        inputs: the name and the dtype of each tensor that the graph takes, in order.
        observers: names of the observers in the prepared graph, by number of the qparams.
        notes: what came up on the way, such as NaN in calibration.
        kernels: what computes a decision after lowering, by its node.
        declined: why a quantized decision has no kernel, by its node.
        native: paths of the modules that lowering put into the graph.
    """

    stage: Stage
    settings: Settings
    plan: QuantizationPlan
    preserved: tuple[str, ...] = ()
    owner: str = "the model"
    inputs: tuple[tuple[str, torch.dtype], ...] = ()
    observers: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    native: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Record":
        return self

    def report(self) -> QuantizationPlan:
        """The plan with all that came of it, to read."""
        decisions = tuple(
            replace(d, kernel=self.kernels.get(d.node, ""), reason=self.declined.get(d.node, d.reason))
            for d in self.plan.decisions
        )
        return replace(self.plan, decisions=decisions, observers=self.observers, notes=self.notes)


class FloatFallback(nn.Module):
    """A model with a float one beside it, for calls of a structure that it wasn't prepared for.

    Args:
        model: prepared or converted.
        float_model: what it was made of.
    """

    def __init__(self, model: nn.Module, float_model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.float_model = float_model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, or the float model's where a guard fails."""
        try:
            return self.model(*args, **kwargs)
        except GuardError:
            return self.float_model(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # The float model is called with the same inputs as the other, which keeps its dtypes.
        return super()._apply(same_dtype(fn), recurse)  # type: ignore[no-untyped-call]


def record_of(module: nn.Module) -> Record | None:
    """The record of a module itself; ``None`` for one that no verb returned."""
    found: Record | None = vars(module).get(RECORD)
    return found


def host_of(model: Any) -> Any:
    """The model itself, where a float one stands beside it."""
    return model.model if isinstance(model, FloatFallback) else model


def records(model: Any) -> dict[str, Record]:
    """The records within a model, by path, that of its host first; empty for what no verb returned."""
    if not isinstance(model, nn.Module):
        return {}
    found: dict[str, Record] = {}
    inside: str | None = None
    for path, module in host_of(model).named_modules():
        record = None if inside is not None and path.startswith(inside) else record_of(module)
        if record is not None:
            found[path] = record
            if not record.plan.python:  # There are no parts within a graph, whatever a backend made of it.
                inside = f"{path}." if path else ""
    return found


def plan_of(found: Mapping[str, Record]) -> QuantizationPlan:
    """The plan of a model, of the records within it."""
    return joined_plan({path: record.report() for path, record in found.items()})
