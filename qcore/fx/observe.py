"""The pass that carries out the plan in the float model: it puts observers where the plan says, and decides nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from qcore.fx.graph_module import QGraphModule
from qcore.fx.names import free_target
from qcore.fx.nodes import new_node
from qcore.observer import FixedQParamsObserver, ObserverBase, StandIns
from qcore.qconfig import spec_of
from qcore.quantization_plan import QParamsSpec, QuantizationPlan

OBSERVER_PREFIX = "activation_post_process"


def make_observer(wanted: QParamsSpec, stand_ins: StandIns) -> ObserverBase:
    """The observer of one set of qparams, with the range that the plan settled on.

    Only a class or an :class:`~qcore.observer.ObserverSpec` whose user left the range open is told; any other
    constructor knows its own.

    Args:
        wanted: from the plan.
        stand_ins: the backend's observers in the place of others.
    """
    traits = wanted.traits
    integers = {"quant_min": wanted.quant_min, "quant_max": wanted.quant_max}
    if wanted.fixed is not None:
        return FixedQParamsObserver(*wanted.fixed, dtype=traits.dtype, **integers)
    spec = spec_of(wanted.constructor)
    if spec is None:
        return wanted.constructor()
    overrides: dict[str, Any] = {}
    if not traits.has_explicit_range and tuple(integers.values()) != (traits.quant_min, traits.quant_max):
        overrides |= integers
    if traits.eps is None and wanted.eps is not None:
        overrides["eps"] = wanted.eps
    return replace(spec, observer=stand_ins.get(spec.observer, spec.observer))(**overrides)


def observe(module: QGraphModule, plan: QuantizationPlan, stand_ins: StandIns) -> dict[int, str]:
    """Insert the plan's observers into ``module``, which must be one of qcore's own copies.

    Args:
        module: the traced and fused model.
        plan: what to insert.
        stand_ins: the backend's observers in the place of others.

    Returns:
        The observers' names, by number of the qparams.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    names: dict[int, str] = {}
    for observation in plan.observations:
        if observation.qparams not in names:
            number = len(names)
            name = free_target(f"{OBSERVER_PREFIX}_{number}", module)
            names[observation.qparams] = name
            module.add_module(name, make_observer(plan.qparams[observation.qparams], stand_ins))
        value = nodes[observation.value]
        readers = list(value.users) if observation.readers is None else [nodes[name] for name in observation.readers]
        with module.graph.inserting_after(value):
            observer = new_node(module.graph, "call_module", names[observation.qparams], (value,))
        observer.meta["example"] = value.meta["example"]
        for reader in dict.fromkeys(readers):
            reader.replace_input_with(value, observer)
    module.recompile()
    return names


def observer_nodes(module: fx.GraphModule, observers: Mapping[int, str]) -> list[tuple[fx.Node, int]]:
    """The nodes that call observers (names, by number of their qparams), each with that number."""
    numbers = {name: number for number, name in observers.items()}
    return [
        (node, numbers[str(node.target)])
        for node in module.graph.nodes
        if node.op == "call_module" and node.target in numbers
    ]
