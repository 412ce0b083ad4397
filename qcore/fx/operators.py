"""The operators that qcore knows, and the one normal form that every way of writing them takes.

``nn.ReLU6()(x)``, ``F.relu6(x)``, ``F.hardtanh(x, 0, 6)``, ``x.clamp(0, 6)``: one operator. The tracer writes each of
them as one and the same node: a call of the operator's function, all arguments in order and none by keyword, and
weights as ``get_attr`` nodes. The passes, the backends' tables and the lowering rules then speak of operators and
never of forms. ``forms.py`` lists the forms.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


class Kind(Enum):
    """What an operator does to the values that pass through it."""

    COMPUTE = "compute"
    #: Bounds its input on one or both sides by constants.
    CLAMP = "clamp"
    #: Only moves, drops, repeats or selects elements: it may as well work on the integers.
    MOVE = "move"


@dataclass(frozen=True)
class Operator:
    """One operator in normal form.

    Attributes:
        name: how tables and reports call it.
        function: what its nodes call.
        activations: positions of the arguments that are activations; a list argument counts as all its members.
        weight: position of the weight, if it has one.
        bias: position of the bias.
        kind: what it does to values.
    """

    name: str
    function: Callable[..., Any]
    activations: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    kind: Kind = Kind.COMPUTE

    @property
    def weights(self) -> tuple[int, ...]:
        """Positions of the weights."""
        return () if self.weight is None else (self.weight,)

    @property
    def biases(self) -> tuple[int, ...]:
        """Positions of the biases."""
        return () if self.bias is None else (self.bias,)


def _weighted(name: str, function: Callable[..., Any]) -> Operator:
    return Operator(name, function, weight=1, bias=2)


def _move(name: str, function: Callable[..., Any]) -> Operator:
    return Operator(name, function, kind=Kind.MOVE)


CONV = tuple(_weighted(f"conv{n}d", getattr(torch, f"conv{n}d")) for n in (1, 2, 3))
CONV_TRANSPOSE = tuple(_weighted(f"conv_transpose{n}d", getattr(torch, f"conv_transpose{n}d")) for n in (1, 2, 3))
LINEAR = _weighted("linear", F.linear)
BATCH_NORM = Operator("batch_norm", F.batch_norm)
CLAMP = Operator("clamp", torch.clamp, kind=Kind.CLAMP)
# Python's own: sizes are added and multiplied, too, and tracing can't tell them from tensors.
ADD = Operator("add", operator.add, activations=(0, 1))
MUL = Operator("mul", operator.mul, activations=(0, 1))
MATMUL = Operator("matmul", torch.matmul, activations=(0, 1))
CAT = _move("cat", torch.cat)
STACK = _move("stack", torch.stack)
MAX_POOL = tuple(_move(f"max_pool{n}d", getattr(torch, f"max_pool{n}d")) for n in (1, 2, 3))
AVG_POOL = tuple(
    Operator(f"avg_pool{n}d", function)
    for n, function in ((1, torch.avg_pool1d), (2, torch._C._nn.avg_pool2d), (3, torch._C._nn.avg_pool3d))
)
ADAPTIVE_AVG_POOL = tuple(Operator(f"adaptive_avg_pool{n}d", getattr(F, f"adaptive_avg_pool{n}d")) for n in (1, 2, 3))
MEAN = Operator("mean", torch.mean)
SIGMOID = Operator("sigmoid", torch.sigmoid)
HARDSIGMOID = Operator("hardsigmoid", F.hardsigmoid)
TANH = Operator("tanh", torch.tanh)
SOFTMAX = Operator("softmax", torch.softmax)
HARDSWISH = Operator("hardswish", F.hardswish)
LEAKY_RELU = Operator("leaky_relu", F.leaky_relu)
ELU = Operator("elu", F.elu)
SILU = Operator("silu", F.silu)
GELU = Operator("gelu", F.gelu)
INTERPOLATE = Operator("interpolate", F.interpolate)
PAD = _move("pad", F.pad)
FLATTEN = _move("flatten", torch.flatten)
UNFLATTEN = _move("unflatten", torch.unflatten)
RESHAPE = _move("reshape", torch.reshape)
PERMUTE = _move("permute", torch.permute)
TRANSPOSE = _move("transpose", torch.transpose)
SQUEEZE = _move("squeeze", torch.squeeze)
UNSQUEEZE = _move("unsqueeze", torch.unsqueeze)
CHUNK = _move("chunk", torch.chunk)
SPLIT = _move("split", torch.split)
GETITEM = _move("getitem", operator.getitem)
NARROW = _move("narrow", torch.narrow)
PIXEL_SHUFFLE = _move("pixel_shuffle", torch.pixel_shuffle)
PIXEL_UNSHUFFLE = _move("pixel_unshuffle", torch.pixel_unshuffle)
CHANNEL_SHUFFLE = _move("channel_shuffle", torch.channel_shuffle)


_BY_FUNCTION: dict[Any, Operator] = {
    value.function: value
    for name, entry in list(globals().items())
    if name.isupper()
    for value in (entry if isinstance(entry, tuple) else (entry,))
    if isinstance(value, Operator)
}

_BY_NAME: dict[str, Operator] = {value.name: value for value in _BY_FUNCTION.values()}

#: The operators that only move elements, for a backend's table.
MOVE_OPERATORS: tuple[Operator, ...] = tuple(op for op in _BY_FUNCTION.values() if op.kind is Kind.MOVE)


def is_listed(operator: Operator) -> bool:
    """Whether an operator is one of this table's."""
    return _BY_NAME.get(operator.name) == operator


def operator_named(name: str) -> Operator:
    """The operator of a name."""
    return _BY_NAME[name]


def operator_of(node: fx.Node) -> Operator | None:
    """The operator of a node in normal form, else ``None``."""
    if node.op != "call_function" or node.kwargs:
        return None
    return _BY_FUNCTION.get(node.target)


def has_weights(node: fx.Node) -> bool:
    """Whether a node's operator has weights."""
    op = operator_of(node)
    return op is not None and bool(op.weights)


def is_tuple(node: fx.Node) -> bool:
    """Whether a node gives several tensors at once, each of which a ``getitem`` then takes out."""
    return operator_of(node) in (CHUNK, SPLIT)


def activation_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads as activations, in order.

    For an operator in normal form these are its ``activations``; for anything else, every node among its arguments.
    """
    op = operator_of(node)
    if op is None:
        return node.all_input_nodes
    found: list[fx.Node] = []
    for position in op.activations:
        value = node.args[position]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node):
                found.append(item)
    return found


def anchor_key(node: fx.Node, module_types: dict[str, type[nn.Module]]) -> object:
    """What a pattern's element is compared with: the operator, else the function, method name or module class."""
    op = operator_of(node)
    if op is not None:
        return op
    if node.op == "call_module":
        return module_types.get(str(node.target))
    return node.target
