"""The operators that qcore knows, and the one normal form that every way of writing them takes: a row for each.

``nn.ReLU6()(x)``, ``F.relu6(x)``, ``F.hardtanh(x, 0, 6)``, ``x.clamp(0, 6)``: one operator. The tracer writes each of
them as one and the same node: a call of the operator's function, all arguments in order and none by keyword, and
weights as ``get_attr`` nodes. The passes, the backends' tables and the lowering rules then speak of operators and
never of forms.

To teach qcore another form of an operator, add it to the operator's row.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qcore.backend_config import Pattern
from qcore.fx import forms


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
        weights: positions of the weights.
        biases: positions of the biases, one for each weight; a bias may be ``None`` in a call.
        kind: what it does to values.
    """

    name: str
    function: Callable[..., Any]
    activations: tuple[int, ...] = (0,)
    weights: tuple[int, ...] = ()
    biases: tuple[int, ...] = ()
    kind: Kind = Kind.COMPUTE

    @property
    def weight(self) -> int | None:
        """Position of the first weight, if there is one."""
        return next(iter(self.weights), None)

    @property
    def bias(self) -> int | None:
        """Position of the first weight's bias."""
        return next(iter(self.biases), None)


@dataclass(frozen=True)
class NormalCall:
    """A call in normal form.

    Attributes:
        operator: the operator; ``None`` means that the first argument is handed through (identity, dropout).
        args: its arguments, in order.
        inplace: whether the call as it was written overwrites its first argument.
    """

    operator: Operator | None
    args: forms.Arguments
    inplace: bool = False


#: Classes of modules, with the names of what their call hands on after the input.
_Modules = Mapping[type[nn.Module], str]


@dataclass(eq=False)
class Form:
    """A way of writing an operator: a signature, and all that is called with it.

    Attributes:
        arguments: has the signature, and gives the arguments of the normal form in order, or ``None`` for a use that
            has no normal form. A parameter ``inplace`` says whether the first argument is overwritten.
        functions: functions, and methods of tensors by their names.
        modules: classes, with the names of what their call hands on after the input: parameters and buffers, then
            ``;`` and plain attributes.
        operator: the one that it is a form of; set by the operator's row.
    """

    arguments: Callable[..., forms.Arguments | None]
    functions: tuple[Any, ...] = ()
    modules: _Modules = field(default_factory=dict)
    operator: Operator | None = None

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.arguments)
        names = list(self.signature.parameters)
        self._inplace = names.index("inplace") if "inplace" in names else None

    def __call__(self, *args: Any, **kwargs: Any) -> NormalCall | None:
        """The call in normal form; raises a ``TypeError`` for arguments that the form doesn't know."""
        normal = self.arguments(*args, **kwargs)
        if normal is None:
            return None
        if self._inplace is None:
            return NormalCall(self.operator, normal)
        inplace = args[self._inplace] if self._inplace < len(args) else kwargs.get("inplace", False)
        return NormalCall(self.operator, normal, bool(inplace))


@dataclass(frozen=True)
class ModuleForm:
    """How a module's call becomes its function's.

    Attributes:
        form: of the function.
        tensors: parameters and buffers that come after the input.
        attributes: plain attributes that come after those.
    """

    form: Form
    tensors: tuple[str, ...]
    attributes: tuple[str, ...]

    def __call__(self, module: nn.Module, tensor: Callable[[str], Any], input: Any) -> NormalCall | None:
        """The call in normal form; ``tensor`` gives a parameter or buffer as a value of the graph."""
        tensors = [tensor(name) for name in self.tensors]
        return self.form(input, *tensors, *(getattr(module, name, None) for name in self.attributes))


#: What a user may call, and what a pattern may name: functions, and tensor methods by name.
FORMS: dict[Any, Form] = {}

#: Modules, likewise.
MODULES: dict[type[nn.Module], ModuleForm] = {}

_BY_FUNCTION: dict[Any, Operator] = {}
_BY_NAME: dict[str, Operator] = {}
#: The operator that each function, method name and module is.
_BY_FORM: dict[Any, Operator] = {}


def _list(operator: Operator | None, *ways: Form) -> None:
    """Put the forms of an operator into the tables; those of none hand on their first argument."""
    for form in ways:
        form.operator = operator
        FORMS.update(dict.fromkeys(form.functions, form))
        for module, names in form.modules.items():
            tensors, _, attributes = names.rpartition(";")
            MODULES[module] = ModuleForm(form, tuple(tensors.split()), tuple(attributes.split()))
        if operator is not None:
            _BY_FORM.update(dict.fromkeys((*form.functions, *form.modules), operator))


def _operator(name: str, function: Callable[..., Any], *ways: Form, **how: Any) -> Operator:
    """A row of the table: an operator with its forms. Its own function is written as the first of them says."""
    made = Operator(name, function, **how)
    _BY_FUNCTION[function] = _BY_NAME[name] = _BY_FORM[function] = made
    _list(made, *ways)
    FORMS[function] = ways[0]
    return made


_move = partial(_operator, kind=Kind.MOVE)


def _spatial(
    name: str, arguments: Callable[..., forms.Arguments | None], module: str, names: str, **how: Any
) -> tuple[Operator, ...]:
    """The rows of an operator of one, two and three spatial dimensions."""
    made = []
    for n in (1, 2, 3):
        functional = getattr(F, name.format(n))
        function = getattr(torch, name.format(n), functional)
        form = Form(partial(arguments, n), (functional,), {getattr(nn, module.format(n)): names})
        made.append(_operator(name.format(n), function, form, **how))
    return tuple(made)


def _each(module: str, names: str) -> _Modules:
    """A module's classes for one, two and three dimensions."""
    return {getattr(nn, module.format(n)): names for n in (1, 2, 3)}


def _unary(name: str, function: Callable[..., Any], functions: tuple[Any, ...], modules: _Modules) -> Operator:
    """The row of a function of single values without parameters."""
    return _operator(name, function, Form(lambda input, inplace=False: (input,), functions, modules))


CONV = _spatial(
    "conv{}d", forms.conv, "Conv{}d", "weight bias; stride padding dilation groups padding_mode",
    weights=(1,), biases=(2,),
)  # fmt: skip
CONV_TRANSPOSE = _spatial(
    "conv_transpose{}d", forms.conv_transpose, "ConvTranspose{}d",
    "weight bias; stride padding output_padding groups dilation",
    weights=(1,), biases=(2,),
)  # fmt: skip
LINEAR = _operator(
    "linear", F.linear,
    Form(lambda input, weight, bias=None: (input, weight, bias), modules={nn.Linear: "weight bias;"}),
    weights=(1,), biases=(2,),
)  # fmt: skip
# Cells that give one tensor, with a weight for the input and one for the state.
RNN_CELLS = tuple(
    _operator(
        function.__name__, function,
        Form(lambda input, hx, w_ih, w_hh, b_ih=None, b_hh=None: (input, hx, w_ih, w_hh, b_ih, b_hh)),
        activations=(0, 1), weights=(2, 3), biases=(4, 5),
    )
    for function in (torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell)
)  # fmt: skip
BATCH_NORM = _operator(
    "batch_norm", F.batch_norm,
    Form(
        forms.batch_norm,
        modules=_each("BatchNorm{}d", "running_mean running_var weight bias; training momentum eps"),
    ),
)  # fmt: skip
CLAMP = _operator(
    "clamp", torch.clamp,
    Form(forms.clamp, (torch.clamp_, "clamp", "clamp_", torch.clip, "clip", "clip_")),
    Form(
        lambda input, min_val=-1.0, max_val=1.0, inplace=False: (input, min_val, max_val),
        (F.hardtanh, F.hardtanh_), {nn.Hardtanh: "min_val max_val inplace"},
    ),
    Form(
        lambda input, inplace=False: (input, 0.0, None),
        (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), {nn.ReLU: "inplace"},
    ),
    Form(lambda input, inplace=False: (input, 0.0, 6.0), (F.relu6,), {nn.ReLU6: "inplace"}),
    kind=Kind.CLAMP,
)  # fmt: skip
# Python's own: sizes are added and multiplied, too, and tracing can't tell them from tensors.
ADD = _operator("add", operator.add, Form(forms.binary, (torch.add, operator.iadd, "add", "add_")), activations=(0, 1))
MUL = _operator(
    "mul", operator.mul, Form(forms.binary, (torch.mul, operator.imul, torch.multiply, "mul", "mul_")),
    activations=(0, 1),
)  # fmt: skip
MATMUL = _operator(
    "matmul", torch.matmul, Form(forms.binary, (operator.matmul, torch.bmm, "matmul", "bmm")), activations=(0, 1)
)
CAT = _move("cat", torch.cat, Form(forms.joined, (torch.concat, torch.concatenate)))
STACK = _move("stack", torch.stack, Form(forms.joined))
MAX_POOL = _spatial(
    "max_pool{}d", forms.max_pool, "MaxPool{}d", "kernel_size stride padding dilation ceil_mode return_indices",
    kind=Kind.MOVE,
)  # fmt: skip
AVG_POOL = _spatial(
    "avg_pool{}d", forms.avg_pool, "AvgPool{}d",
    "kernel_size stride padding ceil_mode count_include_pad divisor_override",
)  # fmt: skip
ADAPTIVE_AVG_POOL = _spatial("adaptive_avg_pool{}d", forms.adaptive_avg_pool, "AdaptiveAvgPool{}d", "output_size")
MEAN = _operator("mean", torch.mean, Form(forms.mean, ("mean",)))
SIGMOID = _unary("sigmoid", torch.sigmoid, (F.sigmoid, "sigmoid", "sigmoid_"), {nn.Sigmoid: ""})
HARDSIGMOID = _unary("hardsigmoid", F.hardsigmoid, ("hardsigmoid", "hardsigmoid_"), {nn.Hardsigmoid: "inplace"})
TANH = _unary("tanh", torch.tanh, (F.tanh, "tanh", "tanh_"), {nn.Tanh: ""})
SOFTMAX = _operator(
    "softmax", torch.softmax,
    Form(forms.softmax, ("softmax",), {nn.Softmax: "dim"}),
    Form(lambda input, dim=None, _stacklevel=3, dtype=None: forms.softmax(input, dim, dtype), (F.softmax,)),
)  # fmt: skip
HARDSWISH = _unary("hardswish", F.hardswish, (), {nn.Hardswish: "inplace"})
LEAKY_RELU = _operator(
    "leaky_relu", F.leaky_relu,
    Form(
        lambda input, negative_slope=0.01, inplace=False: (input, negative_slope),
        (F.leaky_relu_,), {nn.LeakyReLU: "negative_slope inplace"},
    ),
)  # fmt: skip
ELU = _operator(
    "elu", F.elu, Form(lambda input, alpha=1.0, inplace=False: (input, alpha), (F.elu_,), {nn.ELU: "alpha inplace"})
)
SILU = _unary("silu", F.silu, (), {nn.SiLU: "inplace"})
GELU = _operator("gelu", F.gelu, Form(forms.gelu, modules={nn.GELU: "approximate"}))
INTERPOLATE = _operator(
    "interpolate", F.interpolate,
    Form(forms.interpolate, (F.upsample,), {
        nn.Upsample: "size scale_factor mode align_corners recompute_scale_factor",
        nn.UpsamplingNearest2d: "size scale_factor mode align_corners",
        nn.UpsamplingBilinear2d: "size scale_factor mode align_corners",
    }),
)  # fmt: skip
PAD = _move(
    "pad", F.pad,
    Form(forms.pad, modules=_each("ZeroPad{}d", "padding")),
    Form(partial(forms.pad, mode="reflect"), modules=_each("ReflectionPad{}d", "padding")),
    Form(partial(forms.pad, mode="replicate"), modules=_each("ReplicationPad{}d", "padding")),
)  # fmt: skip
FLATTEN = _move(
    "flatten", torch.flatten,
    Form(
        lambda input, start_dim=0, end_dim=-1: (input, start_dim, end_dim),
        ("flatten",), {nn.Flatten: "start_dim end_dim"},
    ),
)  # fmt: skip
UNFLATTEN = _move(
    "unflatten", torch.unflatten,
    Form(lambda input, dim, sizes: (input, dim, sizes), ("unflatten",), {nn.Unflatten: "dim unflattened_size"}),
)  # fmt: skip
RESHAPE = _move("reshape", torch.reshape, Form(forms.sizes, ("reshape", "view")))
PERMUTE = _move("permute", torch.permute, Form(forms.sizes, ("permute",)))
TRANSPOSE = _move(
    "transpose", torch.transpose,
    Form(lambda input, dim0, dim1: (input, dim0, dim1), ("transpose", torch.swapaxes, "swapaxes")),
)  # fmt: skip
SQUEEZE = _move(
    "squeeze", torch.squeeze, Form(lambda input, dim=None: (input,) if dim is None else (input, dim), ("squeeze",))
)
UNSQUEEZE = _move("unsqueeze", torch.unsqueeze, Form(lambda input, dim: (input, dim), ("unsqueeze",)))
CHUNK = _move("chunk", torch.chunk, Form(lambda input, chunks, dim=0: (input, chunks, dim), ("chunk",)))
SPLIT = _move(
    "split", torch.split,
    Form(lambda input, split_size_or_sections, dim=0: (input, split_size_or_sections, dim), ("split",)),
)  # fmt: skip
GETITEM = _move("getitem", operator.getitem, Form(lambda input, index: (input, index)))
NARROW = _move("narrow", torch.narrow, Form(lambda input, dim, start, length: (input, dim, start, length), ("narrow",)))
PIXEL_SHUFFLE = _move(
    "pixel_shuffle", F.pixel_shuffle,
    Form(lambda input, upscale_factor: (input, upscale_factor), modules={nn.PixelShuffle: "upscale_factor"}),
)  # fmt: skip
PIXEL_UNSHUFFLE = _move(
    "pixel_unshuffle", F.pixel_unshuffle,
    Form(lambda input, downscale_factor: (input, downscale_factor), modules={nn.PixelUnshuffle: "downscale_factor"}),
)  # fmt: skip
CHANNEL_SHUFFLE = _move("channel_shuffle", torch.channel_shuffle, Form(lambda input, groups: (input, groups)))

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: Modules that hand on what they get, in evaluation mode.
PASSING = (nn.Identity, *_DROPOUTS)
_list(
    None,
    Form(lambda input, *args, **kwargs: (input,), modules={nn.Identity: ""}),
    Form(
        forms.dropout,
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout),
        dict.fromkeys(_DROPOUTS, "p training"),
    ),
)

#: The operators that only move elements, for a backend's table.
MOVE_OPERATORS: tuple[Operator, ...] = tuple(op for op in _BY_NAME.values() if op.kind is Kind.MOVE)


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


def kept_apart(function: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that has no normal form, so that it isn't taken for one: the last of them by keyword.

    ``torch.clamp(x, low, high)`` by two tensors calls the operator's function, and is another operator.
    """
    names = list(FORMS[function].signature.parameters) if function in _BY_FUNCTION else []
    if not 0 < len(args) <= len(names):
        return args, {}
    return args[:-1], {names[len(args) - 1]: args[-1]}


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
    arguments = [node.args[position] for position in op.activations]
    items = [item for value in arguments for item in (value if isinstance(value, (list, tuple)) else (value,))]
    return [item for item in items if isinstance(item, fx.Node)]


def anchor_key(node: fx.Node, module_types: dict[str, type[nn.Module]]) -> object:
    """What a pattern's element is compared with: the operator, else the function, method name or module class."""
    if node.op == "call_module":
        return module_types.get(str(node.target))
    return operator_of(node) or node.target


def pattern_keys(pattern: Pattern) -> tuple[object, ...]:
    """A pattern as what :func:`anchor_key` gives for its nodes, in the order of execution."""
    elements = pattern if isinstance(pattern, tuple) else (pattern,)
    return tuple(_BY_FORM.get(element, element) for element in elements)
