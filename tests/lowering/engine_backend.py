"""A whole-graph engine as a backend, through public hooks only; an interpreter stands in for a vendor's compiler."""

import operator
from collections.abc import Mapping

import torch
from torch import fx

from qcore import BackendConfig, QConfigMapping, ops
from qcore.fx.fuse import BATCH_NORM_FUSIONS
from qcore.fx.operators import operator_of
from qcore.lowering import Lowered, lower_with_engine
from qcore.plugins import reference
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl

NAME = "interpreter"
QUANTIZED = (ops.quantize_per_tensor, ops.dequantize_per_tensor, ops.dequantize_per_channel)
#: What this engine has no instruction for.
UNKNOWN = ("softmax", "interpolate")
#: How often it compiled, for tests.
compiled: list[tuple] = []


class Program:
    """Instructions with registers, as an engine might have: no graph of torch's, no modules, weights of its own."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.registers: dict[str, torch.Tensor] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.code: list[tuple] = []
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.inputs.append(node.name)
            elif node.op == "get_attr":
                self.registers[node.name] = operator.attrgetter(node.target)(graph).detach().clone()
            elif node.op == "output":
                self.outputs = [result.name for result in node.args[0]]
            else:
                self.code.append((node.name, node.target, fx.map_arg((node.args, node.kwargs), _Register)))

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        registers = {**self.registers, **dict(zip(self.inputs, inputs, strict=True))}
        for name, function, arguments in self.code:
            args, kwargs = fx.node.map_aggregate(
                arguments, lambda value: registers[value.name] if isinstance(value, _Register) else value
            )
            registers[name] = function(*args, **kwargs)
        return [registers[name] for name in self.outputs]


class _Register:
    def __init__(self, node: fx.Node) -> None:
        self.name = node.name


def takes(node: fx.Node) -> bool:
    """Every operator in normal form but some, and what quantizes."""
    known = operator_of(node)
    return node.target in QUANTIZED or (known is not None and known.name not in UNKNOWN)


def compile_subgraph(graph: fx.GraphModule, inputs: tuple) -> Program:
    """A program for inputs of these shapes and dtypes."""
    compiled.append(inputs)
    return Program(graph)


@hookimpl
def qcore_backend_info() -> BackendInfo:
    return BackendInfo(NAME, PLUGIN_API, "an engine that takes subgraphs")


@hookimpl
def qcore_probe() -> Availability:
    return Availability(True)


@hookimpl
def qcore_backend_config() -> BackendConfig:
    return reference.qcore_backend_config()


@hookimpl
def qcore_fusion_patterns() -> tuple:
    return BATCH_NORM_FUSIONS


@hookimpl
def qcore_observers() -> Mapping:
    return {}


@hookimpl
def qcore_default_qconfig_mapping(version: int) -> QConfigMapping:
    return reference.qcore_default_qconfig_mapping(version)


@hookimpl
def qcore_lower(model: fx.GraphModule) -> Lowered:
    return lower_with_engine(model, takes, compile_subgraph, name=NAME)
