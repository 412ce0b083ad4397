"""The pass that carries out the plan in the float model: it puts observers where the plan says, and decides nothing."""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from qcore.fx.graph_module import QGraphModule
from qcore.fx.names import free_target
from qcore.fx.nodes import new_node
from qcore.observer import FixedQParamsObserver, ObserverBase
from qcore.qconfig import ObserverConstructor, build_observer
from qcore.quantization_plan import QParamsSpec, QuantizationPlan

OBSERVER_PREFIX = "activation_post_process"


def make_observer(spec: QParamsSpec, kernels: dict[type[ObserverBase], type[ObserverBase]]) -> ObserverBase:
    """The observer of one set of qparams.

    Args:
        spec: from the plan.
        kernels: a backend's own implementations of observers, by the class that they stand in for.
    """
    if spec.fixed is not None:
        scale, zero_point = spec.fixed
        return FixedQParamsObserver(
            scale,
            zero_point,
            dtype=spec.traits.dtype,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
        )
    constructor: ObserverConstructor = spec.constructor
    observer_class = constructor if isinstance(constructor, type) else getattr(constructor, "observer", None)
    if observer_class in kernels:
        own = kernels[observer_class]
        constructor = own if isinstance(constructor, type) else replace(constructor, observer=own)  # type: ignore[type-var]
    return build_observer(constructor, spec.traits, spec.quant_min, spec.quant_max, spec.eps)


def observe(
    module: QGraphModule, plan: QuantizationPlan, kernels: dict[type[ObserverBase], type[ObserverBase]]
) -> dict[int, str]:
    """Insert the plan's observers into ``module``, which must be one of qcore's own copies.

    Args:
        module: the traced and fused model.
        plan: what to insert.
        kernels: the backend's implementations of observers.

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
            module.add_module(name, make_observer(plan.qparams[observation.qparams], kernels))
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
