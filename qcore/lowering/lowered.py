"""What a backend's ``qcore_lower`` hook answers, and how it becomes a converted model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from qcore.fx.graph_module import QGraphModule, adopt, submodule, with_record
from qcore.fx.record import RECORD, record_of


@dataclass(frozen=True)
class Lowered:
    """A model on a backend's kernels, and what became of each decision of the plan.

    Attributes:
        module: is called like the reference model. If it is a graph (``QGraphModule``), callers that trace, compile or
            ask for gradients are told what they must know; any other is called as it is.
        kernels: what computes a decision, by the decision's ``node``; several decisions may name one engine.
        declined: why a quantized decision has no kernel, by its ``node``.
        reference: the reference model, where each of its decisions was carried out one by one. A model that doesn't say
            so is run once beside the reference.
    """

    module: nn.Module
    kernels: Mapping[str, str] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    reference: nn.Module | None = None


def converted(reference: QGraphModule, lowered: Lowered) -> nn.Module:
    """The lowered model with its record and all that its user reads of it."""
    module, record = lowered.module, record_of(reference)
    assert record is not None
    told = replace(record, kernels=lowered.kernels, declined=lowered.declined)
    if module is reference:
        vars(module)[RECORD] = told
        return module
    for name in record.preserved:
        if not hasattr(module, name):
            adopt(module, reference, name)
    module.train(reference.training)
    record = replace(told, stage="converted")
    if not isinstance(module, QGraphModule):
        vars(module)[RECORD] = record
        return module
    theirs = {id(inner) for inner in reference.modules()}
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    native = frozenset(path for path in called if id(submodule(module, path)) not in theirs)
    return with_record(module, replace(record, native=native))
