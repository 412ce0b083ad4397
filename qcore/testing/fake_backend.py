"""A small and complete backend on nothing but plain torch: the example for authors of backends, and one for tests.

What a plugin's modules hold stands here on one page: kernels (modules that compute on integers), the BackendConfig that
says which operators they take, a default mapping, the rules that put kernels into a model, and the hooks.

    with plugged_in("fake", FakeBackend().plugin()):
        prepared = prepare_fx(model, get_default_qconfig_mapping("fake"), inputs, backend="fake")
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore import ops
from qcore.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig, DTypeWithConstraints, Pattern
from qcore.dtypes import QScheme
from qcore.fx import operators as op
from qcore.fx.fuse import BATCH_NORM_FUSIONS
from qcore.fx.graph_module import QGraphModule
from qcore.fx.sharing import sharing_patterns
from qcore.lowering import Declined, Lowered, LoweringRule, QParams, QuantizedCall, QuantizedWeight, lower_with_rules
from qcore.observer import HistogramObserver, PerChannelMinMaxObserver
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import QConfigMapping


class Quantize(nn.Module):
    """From real numbers to integers.

    All that depends on data is a buffer, the bounds of a clamp included, so that a state_dict is the whole model.

    Args:
        qparams: of the integers.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.dtype = qparams.dtype
        whole = torch.iinfo(self.dtype)
        low, high = qparams.bounds or (whole.min, whole.max)
        values = {"scale": qparams.scale, "zero_point": qparams.zero_point, "low": low, "high": high}
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """The integers of ``x``."""
        steps = torch.round(ops.as_float32(x) * (1.0 / self.scale)) + self.zero_point
        return torch.clamp(steps, self.low, self.high).to(self.dtype)


class Dequantize(nn.Module):
    """From integers to real numbers.

    Args:
        scale: of any shape that the integers can be multiplied by.
        zero_point: likewise.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, integers: Tensor) -> Tensor:
        """The real numbers that ``integers`` stand for."""
        return (integers.to(torch.float32) - self.zero_point) * self.scale


class Weight(Dequantize):
    """A weight, kept as integers."""

    values: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        channels = [1] * weight.values.dim()
        if weight.axis is not None:
            channels[weight.axis] = -1
        super().__init__(weight.scale.reshape(channels).clone(), weight.zero_point.reshape(channels).clone())
        self.register_buffer("values", weight.values.clone())

    def forward(self) -> Tensor:  # type: ignore[override]
        """The real weight."""
        return super().forward(self.values)


class RoundedAtRunTime(nn.Module):
    """Rounds a float to as many integers as its own values need.

    Args:
        bounds: the smallest and the largest integer.
    """

    def __init__(self, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self, x: Tensor) -> Tensor:
        """The real numbers that the integers stand for."""
        x = ops.as_float32(x)
        scale, zero_point = ops.dynamic_qparams(x, *self.bounds)
        steps = torch.round(x * (1.0 / scale)) + zero_point
        return (torch.clamp(steps, *self.bounds) - zero_point) * scale


@dataclass(frozen=True)
class Named:
    """Stands for a node among the arguments of an operator."""

    name: str


class Kernel(nn.Module):
    """Any chain of operators, with any number of weights: takes integers and gives integers.

    A real kernel computes with integers, in memory that it packed; this one makes floats of them.

    Args:
        call: what to compute.
    """

    def __init__(self, call: QuantizedCall) -> None:
        super().__init__()
        self.steps = [(node.name, _with_names((node.args, node.kwargs))) for node in call.nodes]
        self.operators = [getattr(op.operator_of(node), "name", "") for node in call.nodes]
        # What is no operator is a module of a class that the pattern names.
        self.called = nn.ModuleList(nn.Identity() if m is None else copy.deepcopy(m) for m in call.modules)
        names = (name or type(module).__name__ for name, module in zip(self.operators, self.called, strict=True))
        self.kernel_name = f"fake {' + '.join(names)}"
        self.inputs = nn.ModuleList(_leave(qparams) for qparams in call.inputs)
        if call.dynamic is not None:
            self.inputs.extend(RoundedAtRunTime(call.dynamic) for _ in op.activation_inputs(call.nodes[0]))
        self.weights = nn.ModuleList(map(Weight, call.weights))
        for number, bias in enumerate(call.biases):
            self.register_buffer(f"bias_{number}", None if bias is None else bias.clone())
        self.output = nn.Identity() if call.output is None else Quantize(call.output)
        operator = op.operator_of(call.nodes[0])
        constants = (*operator.weights, *operator.biases) if operator is not None else ()
        values = (*call.sources, *call.computed, *(call.args[place] for place in constants))
        self.names = [getattr(value, "name", "") for value in values]

    def forward(self, *given: Tensor) -> Tensor:
        """The integers of the result, or floats if nobody quantizes it.

        Args:
            given: the integers that the first operators read, and then whatever else the graph computes for them.
        """
        count = len(self.inputs)
        inputs = [leave(x) for leave, x in zip(self.inputs, given[:count], strict=True)]
        weights = [weight() for weight in self.weights]
        biases = [getattr(self, f"bias_{number}") for number in range(len(weights))]
        values = dict(zip(self.names, (*inputs, *given[count:], *weights, *biases), strict=True))
        for (name, arguments), operator, module in zip(self.steps, self.operators, self.called, strict=True):
            function: Any = op.operator_named(operator).function if operator else module
            filled: Any = fx.node.map_aggregate(arguments, lambda a: values[a.name] if isinstance(a, Named) else a)
            values[name] = function(*filled[0], **filled[1])
        result: Tensor = self.output(values[self.steps[-1][0]])
        return result


def _with_names(arguments: Any) -> Any:
    """Arguments with names in the place of nodes, so that a kernel can be copied and pickled without its graph."""

    def named(argument: Any) -> Any:
        return Named(argument.name) if isinstance(argument, fx.Node) else argument

    return fx.node.map_aggregate(arguments, named)


def _leave(qparams: QParams) -> nn.Module:
    return Dequantize(torch.tensor(qparams.scale, dtype=torch.float32), torch.tensor(qparams.zero_point))


class FakeBackend:
    """A backend that a test or an author varies by overriding what should be different.

    Attributes:
        name: of the backend.
        dtype: of activations.
        patterns: what it has kernels for that give a range of their own: operators, module classes, and chains (tuples
            that begin with one of these).
    """

    name = "fake"
    dtype = torch.uint8
    patterns: Sequence[Pattern] = (
        *op.CONV, op.LINEAR, *op.RNN_CELLS, op.ADD, op.MUL, op.MATMUL, op.MEAN, *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL,
        op.SIGMOID, op.HARDSIGMOID, op.TANH, op.SOFTMAX, op.HARDSWISH, op.LEAKY_RELU, op.ELU, op.SILU, op.GELU,
    )  # fmt: skip

    def config(self) -> BackendConfig:
        """What the kernels take."""
        patterns = [BackendPatternConfig(p, dtype_configs=self.dtypes(op.pattern_keys(p)[0])) for p in self.patterns]
        patterns += sharing_patterns(DTypeConfig(self.dtype, self.dtype))
        return BackendConfig(self.name).set_backend_pattern_configs(patterns)

    def dtypes(self, first: Any) -> list[DTypeConfig]:
        """The dtypes of a pattern.

        Args:
            first: its first operator, or a module class.
        """
        if not getattr(first, "weights", ()):
            return [DTypeConfig(self.dtype, self.dtype)]
        weight = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_channel_symmetric,), ch_axis=0)
        static = DTypeConfig(self.dtype, self.dtype, weight, torch.float32)
        if first is not op.LINEAR:
            return [static]
        dynamic = DTypeConfig(self.dtype, torch.float32, weight, torch.float32, is_dynamic=True)
        weight_only = DTypeConfig(torch.float32, torch.float32, weight, torch.float32)
        return [static, dynamic, weight_only]

    def mapping(self, version: int) -> QConfigMapping:
        """The default mapping.

        Args:
            version: which; there is one only.
        """
        weight = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
        return QConfigMapping().set_global(QConfig(HistogramObserver.with_args(dtype=self.dtype), weight))

    def kernel(self, call: QuantizedCall) -> nn.Module | Declined:
        """What computes a call."""
        return Kernel(call)

    def enter(self, qparams: QParams) -> nn.Module:
        """What makes integers of a float."""
        return Quantize(qparams)

    def leave(self, qparams: QParams) -> nn.Module:
        """What goes back."""
        return _leave(qparams)

    def rules(self) -> list[LoweringRule]:
        """Which kernel computes which operators."""
        # These hand on the qparams of their input. What else does works on integers without a kernel.
        patterns = (*self.patterns, op.CLAMP, op.PAD, op.INTERPOLATE, *op.MAX_POOL)
        static = [LoweringRule(pattern, self.kernel, takes_computed=True) for pattern in patterns]
        return [*static, LoweringRule(op.LINEAR, self.kernel, is_dynamic=True)]

    def lower(self, model: QGraphModule) -> Lowered:
        """A reference model on the kernels."""
        return lower_with_rules(model, self.rules(), enter=self.enter, leave=self.leave)

    def plugin(self) -> SimpleNamespace:
        """The hooks; of a packaged plugin they are the functions of a module."""
        hooks: dict[str, Callable[..., Any]] = {
            "qcore_backend_info": lambda: BackendInfo(self.name, PLUGIN_API, "plain torch, as an example"),
            "qcore_probe": lambda: Availability(True),
            "qcore_backend_config": lambda: self.config(),
            "qcore_fusion_patterns": lambda: BATCH_NORM_FUSIONS,
            "qcore_default_qconfig_mapping": lambda version: self.mapping(version),
            "qcore_lower": lambda model: self.lower(model),
        }
        return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})
