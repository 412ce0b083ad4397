"""The operators that qcore knows, and the one normal form that every way of writing them takes.

``nn.ReLU6()(x)``, ``F.relu6(x)``, ``F.hardtanh(x, 0, 6)``, ``x.clamp(0, 6)``: one operator. The tracer writes each of
them as one and the same node: a call of the operator's function, all arguments in order and none by keyword, and
weights as ``get_attr`` nodes. The passes, the backends' tables and the lowering rules then speak of operators and
never of forms. To teach qcore another form, add a line to ``FORMS`` or ``MODULES``.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qcore.backend_config import Pattern


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


@dataclass(frozen=True)
class Call:
    """An operator with its arguments, as a form gives it.

    Attributes:
        operator: the operator; ``None`` means that the first argument is handed through (identity, dropout).
        args: its arguments, in order.
        inplace: whether the form overwrites its first argument.
    """

    operator: Operator | None
    args: tuple[Any, ...]
    inplace: bool = False


def _weighted(name: str, function: Callable[..., Any]) -> Operator:
    return Operator(name, function, weight=1, bias=2)


def _move(name: str, function: Callable[..., Any]) -> Operator:
    return Operator(name, function, kind=Kind.MOVE)


CONV = tuple(_weighted(f"conv{n}d", getattr(torch, f"conv{n}d")) for n in (1, 2, 3))
CONV_TRANSPOSE = tuple(_weighted(f"conv_transpose{n}d", getattr(torch, f"conv_transpose{n}d")) for n in (1, 2, 3))
LINEAR = _weighted("linear", F.linear)
BATCH_NORM = Operator("batch_norm", F.batch_norm)
CLAMP = Operator("clamp", torch.clamp, kind=Kind.CLAMP)
ADD = Operator("add", torch.add, activations=(0, 1))
MUL = Operator("mul", torch.mul, activations=(0, 1))
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


def _one(value: Any, n: int) -> Any:
    return (value,) * n if isinstance(value, int) else value


def _conv(n: int) -> Callable[..., Call]:
    def form(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
    ) -> Call:
        args = (input, weight, bias, _one(stride, n), _one(padding, n), _one(dilation, n), groups)
        return Call(CONV[n - 1], args)

    return form


def _conv_transpose(n: int) -> Callable[..., Call]:
    def form(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> Call:
        spatial = (_one(stride, n), _one(padding, n), _one(output_padding, n), groups, _one(dilation, n))
        return Call(CONV_TRANSPOSE[n - 1], (input, weight, bias, *spatial))

    return form


def _linear(input: Any, weight: Any, bias: Any = None) -> Call:
    return Call(LINEAR, (input, weight, bias))


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call:
    return Call(BATCH_NORM, (input, running_mean, running_var, weight, bias, training, momentum, eps))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _clamp(input: Any, min: Any = None, max: Any = None) -> Call | None:
    bounds = (min, max)
    if bounds == (None, None) or not all(bound is None or _is_number(bound) for bound in bounds):
        return None
    return Call(CLAMP, (input, min, max))


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Call:
    return Call(CLAMP, (input, min_val, max_val), inplace)


def _relu(input: Any, inplace: bool = False) -> Call:
    return Call(CLAMP, (input, 0.0, None), inplace)


def _relu6(input: Any, inplace: bool = False) -> Call:
    return Call(CLAMP, (input, 0.0, 6.0), inplace)


def _binary(op: Operator) -> Callable[..., Call | None]:
    def form(input: Any, other: Any, *, alpha: Any = 1) -> Call | None:
        return Call(op, (input, other)) if alpha == 1 else None

    return form


def _joined(op: Operator) -> Callable[..., Call | None]:
    def form(tensors: Any, dim: int = 0) -> Call | None:
        return Call(op, (list(tensors), dim)) if isinstance(tensors, (list, tuple)) else None

    return form


def _max_pool(n: int) -> Callable[..., Call | None]:
    def form(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Call | None:
        if return_indices:
            return None
        kernel = _one(kernel_size, n)
        stride = kernel if stride is None or stride == [] else _one(stride, n)
        return Call(MAX_POOL[n - 1], (input, kernel, stride, _one(padding, n), _one(dilation, n), ceil_mode))

    return form


def _avg_pool(n: int) -> Callable[..., Call | None]:
    def form(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Call | None:
        kernel = _one(kernel_size, n)
        stride = kernel if stride is None or stride == [] else _one(stride, n)
        args = (input, kernel, stride, _one(padding, n), ceil_mode, count_include_pad)
        return Call(AVG_POOL[n - 1], args if n == 1 else (*args, divisor_override))

    return form


def _adaptive_avg_pool(n: int) -> Callable[..., Call]:
    def form(input: Any, output_size: Any) -> Call:
        return Call(ADAPTIVE_AVG_POOL[n - 1], (input, _one(output_size, n)))

    return form


def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Call | None:
    if dtype is not None or dim is None:
        return None
    return Call(MEAN, (input, (dim,) if isinstance(dim, int) else tuple(dim), keepdim))


def _unary(op: Operator) -> Callable[..., Call]:
    def form(input: Any, inplace: bool = False) -> Call:
        return Call(op, (input,), inplace)

    return form


def _softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Call | None:
    return None if dim is None or dtype is not None else Call(SOFTMAX, (input, dim))


def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Call:
    return Call(LEAKY_RELU, (input, negative_slope), inplace)


def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Call:
    return Call(ELU, (input, alpha), inplace)


def _gelu(input: Any, approximate: str = "none") -> Call | None:
    return Call(GELU, (input,)) if approximate == "none" else None


def _interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Call | None:
    if recompute_scale_factor or antialias:
        return None
    return Call(INTERPOLATE, (input, size, scale_factor, mode, align_corners))


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Call | None:
    # Only zero is sure to lie in the range of what it is put around.
    if mode == "constant" and value not in (None, 0, 0.0):
        return None
    return Call(PAD, (input, tuple(pad) if isinstance(pad, (list, tuple)) else pad, mode, value))


def _shape_args(op: Operator) -> Callable[..., Call | None]:
    """A form whose sizes come as one sequence or as separate arguments."""

    def form(input: Any, *sizes: Any) -> Call | None:
        if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
            return None
        flat = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if isinstance(flat, fx.Node):
            flat = (flat,) if len(sizes) == 1 and not _is_size(flat) else flat
        return Call(op, (input, tuple(flat) if isinstance(flat, (list, tuple)) else flat))

    return form


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a whole ``torch.Size`` (``x.shape``, ``x.size()``) rather than one entry of it."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"


def _flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Call:
    return Call(FLATTEN, (input, start_dim, end_dim))


def _unflatten(input: Any, dim: int, sizes: Any) -> Call:
    return Call(UNFLATTEN, (input, dim, sizes))


def _transpose(input: Any, dim0: int, dim1: int) -> Call:
    return Call(TRANSPOSE, (input, dim0, dim1))


def _squeeze(input: Any, dim: Any = None) -> Call:
    return Call(SQUEEZE, (input,) if dim is None else (input, dim))


def _unsqueeze(input: Any, dim: int) -> Call:
    return Call(UNSQUEEZE, (input, dim))


def _chunk(input: Any, chunks: int, dim: int = 0) -> Call:
    return Call(CHUNK, (input, chunks, dim))


def _split(input: Any, split_size_or_sections: Any, dim: int = 0) -> Call:
    return Call(SPLIT, (input, split_size_or_sections, dim))


def _getitem(input: Any, index: Any) -> Call:
    return Call(GETITEM, (input, index))


def _narrow(input: Any, dim: int, start: Any, length: Any) -> Call:
    return Call(NARROW, (input, dim, start, length))


def _factor(op: Operator) -> Callable[..., Call]:
    def form(input: Any, factor: int) -> Call:
        return Call(op, (input, factor))

    return form


def _identity(input: Any, *_args: Any, **_kwargs: Any) -> Call:
    return Call(None, (input,))


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Call | None:
    return None if training else Call(None, (input,))


Form = Callable[..., Call | None]

#: Functions (by themselves) and tensor methods (by name) to the form that reads their arguments.
FORMS: dict[Any, Form] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.clamp, torch.clamp_, "clamp", "clamp_", torch.clip, "clip", "clip_"), _clamp),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    F.relu6: _relu6,
    **dict.fromkeys((torch.add, operator.add, operator.iadd, "add", "add_"), _binary(ADD)),
    **dict.fromkeys((torch.mul, operator.mul, operator.imul, torch.multiply, "mul", "mul_"), _binary(MUL)),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), _binary(MATMUL)),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _joined(CAT)),
    torch.stack: _joined(STACK),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), _unary(SIGMOID)),
    **dict.fromkeys((F.hardsigmoid, "hardsigmoid", "hardsigmoid_"), _unary(HARDSIGMOID)),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), _unary(TANH)),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), _softmax),
    F.hardswish: _unary(HARDSWISH),
    F.silu: _unary(SILU),
    F.gelu: _gelu,
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.elu, F.elu_), _elu),
    **dict.fromkeys((F.interpolate, F.upsample), _interpolate),
    F.pad: _pad,
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.unflatten, "unflatten"), _unflatten),
    **dict.fromkeys((torch.reshape, "reshape", "view"), _shape_args(RESHAPE)),
    **dict.fromkeys((torch.permute, "permute"), _shape_args(PERMUTE)),
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes, "swapaxes"), _transpose),
    **dict.fromkeys((torch.squeeze, "squeeze"), _squeeze),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), _unsqueeze),
    **dict.fromkeys((torch.chunk, "chunk"), _chunk),
    **dict.fromkeys((torch.split, "split"), _split),
    operator.getitem: _getitem,
    **dict.fromkeys((torch.narrow, "narrow"), _narrow),
    F.pixel_shuffle: _factor(PIXEL_SHUFFLE),
    F.pixel_unshuffle: _factor(PIXEL_UNSHUFFLE),
    torch.channel_shuffle: _factor(CHANNEL_SHUFFLE),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout), _dropout),
    "contiguous": _identity,
}
for _n in (1, 2, 3):
    FORMS[CONV[_n - 1].function] = FORMS[getattr(F, f"conv{_n}d")] = _conv(_n)
    FORMS[CONV_TRANSPOSE[_n - 1].function] = FORMS[getattr(F, f"conv_transpose{_n}d")] = _conv_transpose(_n)
    FORMS[MAX_POOL[_n - 1].function] = FORMS[getattr(F, f"max_pool{_n}d")] = _max_pool(_n)
    FORMS[AVG_POOL[_n - 1].function] = FORMS[getattr(F, f"avg_pool{_n}d")] = _avg_pool(_n)
    FORMS[ADAPTIVE_AVG_POOL[_n - 1].function] = _adaptive_avg_pool(_n)

#: Functions and methods that overwrite their first argument.
INPLACE: set[Any] = {
    F.hardtanh_, F.relu_, torch.relu_, torch.clamp_, F.leaky_relu_, F.elu_, operator.iadd, operator.imul,
    "relu_", "clamp_", "clip_", "add_", "mul_", "sigmoid_", "hardsigmoid_", "tanh_",
}  # fmt: skip

#: Reads an attribute of the module that is being called, as a ``get_attr`` value (``None`` stays ``None``).
Attribute = Callable[[str], Any]
ModuleForm = Callable[[Any, Attribute, Any], Call | None]


def _conv_module(n: int) -> ModuleForm:
    def form(module: Any, attribute: Attribute, input: Any) -> Call | None:
        if module.padding_mode != "zeros":
            return None  # The tracer goes into the module, which pads and then calls the function.
        return _conv(n)(
            input,
            attribute("weight"),
            attribute("bias"),
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )

    return form


def _batch_norm_module(module: Any, attribute: Attribute, input: Any) -> Call | None:
    if module.training or module.running_mean is None:
        return None
    mean, var = attribute("running_mean"), attribute("running_var")
    return _batch_norm(input, mean, var, attribute("weight"), attribute("bias"), False, 0.1, module.eps)


def _linear_module(module: Any, attribute: Attribute, input: Any) -> Call:
    return _linear(input, attribute("weight"), attribute("bias"))


def _plain(form: Callable[[Any, Any], Call | None]) -> ModuleForm:
    """A module form that needs no attribute of the module as a value."""
    return lambda module, _attribute, input: form(module, input)


MODULES: dict[type[nn.Module], ModuleForm] = {
    nn.Linear: _linear_module,
    nn.BatchNorm1d: _batch_norm_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.BatchNorm3d: _batch_norm_module,
    nn.ReLU: _plain(lambda m, x: _relu(x, m.inplace)),
    nn.ReLU6: _plain(lambda m, x: _relu6(x, m.inplace)),
    nn.Hardtanh: _plain(lambda m, x: _hardtanh(x, m.min_val, m.max_val, m.inplace)),
    nn.Sigmoid: _plain(lambda m, x: Call(SIGMOID, (x,))),
    nn.Hardsigmoid: _plain(lambda m, x: Call(HARDSIGMOID, (x,), m.inplace)),
    nn.Tanh: _plain(lambda m, x: Call(TANH, (x,))),
    nn.Softmax: _plain(lambda m, x: _softmax(x, m.dim)),
    nn.Hardswish: _plain(lambda m, x: Call(HARDSWISH, (x,), m.inplace)),
    nn.SiLU: _plain(lambda m, x: Call(SILU, (x,), m.inplace)),
    nn.LeakyReLU: _plain(lambda m, x: _leaky_relu(x, m.negative_slope, m.inplace)),
    nn.ELU: _plain(lambda m, x: _elu(x, m.alpha, m.inplace)),
    nn.Flatten: _plain(lambda m, x: _flatten(x, m.start_dim, m.end_dim)),
    nn.Unflatten: _plain(lambda m, x: _unflatten(x, m.dim, m.unflattened_size)),
    nn.Upsample: _plain(
        lambda m, x: _interpolate(x, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)
    ),
    nn.UpsamplingNearest2d: _plain(lambda m, x: _interpolate(x, m.size, m.scale_factor)),
    nn.PixelShuffle: _plain(lambda m, x: Call(PIXEL_SHUFFLE, (x, m.upscale_factor))),
    nn.PixelUnshuffle: _plain(lambda m, x: Call(PIXEL_UNSHUFFLE, (x, m.downscale_factor))),
    nn.Identity: _plain(lambda m, x: Call(None, (x,))),
}
for _n in (1, 2, 3):
    MODULES[getattr(nn, f"Conv{_n}d")] = _conv_module(_n)
    MODULES[getattr(nn, f"MaxPool{_n}d")] = _plain(
        lambda m, x, n=_n: _max_pool(n)(  # type: ignore[misc]  # mypy can't infer a lambda with a default
            x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
        )
    )
    MODULES[getattr(nn, f"AvgPool{_n}d")] = _plain(
        lambda m, x, n=_n: _avg_pool(n)(  # type: ignore[misc]
            x,
            m.kernel_size,
            m.stride,
            m.padding,
            m.ceil_mode,
            m.count_include_pad,
            getattr(m, "divisor_override", None),
        )
    )
    MODULES[getattr(nn, f"AdaptiveAvgPool{_n}d")] = _plain(
        lambda m, x, n=_n: _adaptive_avg_pool(n)(x, m.output_size)  # type: ignore[misc]
    )
    MODULES[getattr(nn, f"ZeroPad{_n}d")] = _plain(lambda m, x: _pad(x, m.padding))
    MODULES[getattr(nn, f"ReflectionPad{_n}d")] = _plain(lambda m, x: _pad(x, m.padding, "reflect"))
    MODULES[getattr(nn, f"ReplicationPad{_n}d")] = _plain(lambda m, x: _pad(x, m.padding, "replicate"))
for _dropout_class in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout):
    MODULES[_dropout_class] = _plain(lambda m, x: None if m.training else Call(None, (x,)))

#: Module classes that a pattern may name and whose form needs more than the class to say which operator it is.
_PATTERN_MODULES: dict[type[nn.Module], Operator] = {
    nn.Linear: LINEAR,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh), CLAMP),
    nn.Sigmoid: SIGMOID,
    nn.Hardsigmoid: HARDSIGMOID,
    nn.Tanh: TANH,
    nn.Softmax: SOFTMAX,
    nn.Hardswish: HARDSWISH,
    nn.SiLU: SILU,
    nn.LeakyReLU: LEAKY_RELU,
    nn.ELU: ELU,
    nn.Flatten: FLATTEN,
    nn.Upsample: INTERPOLATE,
    nn.PixelShuffle: PIXEL_SHUFFLE,
    nn.PixelUnshuffle: PIXEL_UNSHUFFLE,
    **{getattr(nn, f"Conv{n}d"): CONV[n - 1] for n in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{n}d"): CONV_TRANSPOSE[n - 1] for n in (1, 2, 3)},
    **{getattr(nn, f"MaxPool{n}d"): MAX_POOL[n - 1] for n in (1, 2, 3)},
    **{getattr(nn, f"AvgPool{n}d"): AVG_POOL[n - 1] for n in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveAvgPool{n}d"): ADAPTIVE_AVG_POOL[n - 1] for n in (1, 2, 3)},
    **{getattr(nn, f"{kind}Pad{n}d"): PAD for n in (1, 2, 3) for kind in ("Zero", "Reflection", "Replication")},
}

_BY_FUNCTION: dict[Any, Operator] = {
    value.function: value
    for name, entry in list(globals().items())
    if name.isupper()
    for value in (entry if isinstance(entry, tuple) else (entry,))
    if isinstance(value, Operator)
}

#: The operators that only move elements, for a backend's table.
MOVE_OPERATORS: tuple[Operator, ...] = tuple(op for op in _BY_FUNCTION.values() if op.kind is Kind.MOVE)


def operator_of(node: fx.Node) -> Operator | None:
    """The operator of a node in normal form, else ``None``."""
    if node.op != "call_function" or node.kwargs:
        return None
    return _BY_FUNCTION.get(node.target)


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


def pattern_keys(pattern: Pattern) -> tuple[object, ...]:
    """A BackendConfig's pattern as keys that :func:`anchor_key` gives, in the order of execution."""
    elements = pattern if isinstance(pattern, tuple) else (pattern,)
    return tuple(_pattern_key(element) for element in elements)


def _pattern_key(element: Any) -> object:
    if isinstance(element, Operator) or element is None:
        return element
    if isinstance(element, type) and element in _PATTERN_MODULES:
        return _PATTERN_MODULES[element]
    if element in _FORM_OPERATORS:
        return _FORM_OPERATORS[element]
    return element


#: Forms by the operator that they give, for patterns that name a function or a method.
_FORM_OPERATORS: dict[Any, Operator] = {}


def _probe_forms() -> None:
    value = fx.Graph().placeholder("x")
    for key, form in FORMS.items():
        for args in (
            (value,),
            (value, 1),
            (value, (1, 1)),
            ((value,),),
            (value, value),
            (value, 0, 1),
            (value, value, value),
        ):
            try:
                call = form(*args)
            except (TypeError, ValueError):
                continue
            if call is not None and call.operator is not None:
                _FORM_OPERATORS[key] = call.operator
                break


_probe_forms()
