"""Every way of writing an operator, and how its arguments become those of the normal form (see ``operators.py``).

A form is a function with the signature of what the user calls; it gives the operator and its arguments in order, or
``None`` for a use that has no normal form and stays as it is. To teach qcore another form, add a line to a table below.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qcore.backend_config import Pattern
from qcore.fx.operators import (
    ADAPTIVE_AVG_POOL,
    ADD,
    AVG_POOL,
    BATCH_NORM,
    CAT,
    CHANNEL_SHUFFLE,
    CHUNK,
    CLAMP,
    CONV,
    CONV_TRANSPOSE,
    ELU,
    FLATTEN,
    GELU,
    GETITEM,
    HARDSIGMOID,
    HARDSWISH,
    INTERPOLATE,
    LEAKY_RELU,
    LINEAR,
    MATMUL,
    MAX_POOL,
    MEAN,
    MUL,
    NARROW,
    PAD,
    PERMUTE,
    PIXEL_SHUFFLE,
    PIXEL_UNSHUFFLE,
    RESHAPE,
    SIGMOID,
    SILU,
    SOFTMAX,
    SPLIT,
    SQUEEZE,
    STACK,
    TANH,
    TRANSPOSE,
    UNFLATTEN,
    UNSQUEEZE,
    Operator,
)


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


Form = Callable[..., Call | None]


def _one(value: Any, n: int) -> Any:
    return (value,) * n if isinstance(value, int) else value


def _conv(n: int) -> Form:
    def form(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
        padding_mode: str = "zeros",
    ) -> Call | None:
        if padding_mode != "zeros":
            return None  # The tracer goes into the module, which pads and then calls the function.
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
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    if training or running_mean is None or running_var is None:
        return None
    momentum = 0.1 if momentum is None else momentum
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


#: What a user may call, and what a pattern may name: functions, and tensor methods by name.
FORMS: dict[Any, Form] = {}

#: Modules, with the tensors and the attributes that their form takes after the input.
MODULES: dict[type[nn.Module], "ModuleForm"] = {}

#: The operator that each of them is, for patterns.
_OPERATOR_OF_FORM: dict[Any, Operator] = {}


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

    def __call__(self, module: nn.Module, tensor: Callable[[str], Any], input: Any) -> Call | None:
        """The call in normal form; ``tensor`` gives a parameter or buffer as a value of the graph."""
        tensors = [tensor(name) for name in self.tensors]
        return self.form(input, *tensors, *(getattr(module, name, None) for name in self.attributes))


def _functions(op: Operator | None, form: Form, targets: Iterable[Any]) -> None:
    for target in targets:
        FORMS[target] = form
        if op is not None:
            _OPERATOR_OF_FORM[target] = op


def _module(op: Operator | None, form: Form, module: type[nn.Module], attributes: str = "", tensors: str = "") -> None:
    MODULES[module] = ModuleForm(form, tuple(tensors.split()), tuple(attributes.split()))
    if op is not None:
        _OPERATOR_OF_FORM[module] = op


for _n in (1, 2, 3):
    _functions(CONV[_n - 1], _conv(_n), (CONV[_n - 1].function, getattr(F, f"conv{_n}d")))
    _functions(
        CONV_TRANSPOSE[_n - 1],
        _conv_transpose(_n),
        (CONV_TRANSPOSE[_n - 1].function, getattr(F, f"conv_transpose{_n}d")),
    )
    _functions(MAX_POOL[_n - 1], _max_pool(_n), (MAX_POOL[_n - 1].function, getattr(F, f"max_pool{_n}d")))
    _functions(AVG_POOL[_n - 1], _avg_pool(_n), (AVG_POOL[_n - 1].function, getattr(F, f"avg_pool{_n}d")))
    _functions(ADAPTIVE_AVG_POOL[_n - 1], _adaptive_avg_pool(_n), (ADAPTIVE_AVG_POOL[_n - 1].function,))
_functions(LINEAR, _linear, (F.linear,))
_functions(BATCH_NORM, _batch_norm, (F.batch_norm,))
_functions(CLAMP, _clamp, (torch.clamp, torch.clamp_, "clamp", "clamp_", torch.clip, "clip", "clip_"))
_functions(CLAMP, _hardtanh, (F.hardtanh, F.hardtanh_))
_functions(CLAMP, _relu, (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"))
_functions(CLAMP, _relu6, (F.relu6,))
_functions(ADD, _binary(ADD), (torch.add, operator.add, operator.iadd, "add", "add_"))
_functions(MUL, _binary(MUL), (torch.mul, operator.mul, operator.imul, torch.multiply, "mul", "mul_"))
_functions(MATMUL, _binary(MATMUL), (torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"))
_functions(CAT, _joined(CAT), (torch.cat, torch.concat, torch.concatenate))
_functions(STACK, _joined(STACK), (torch.stack,))
_functions(MEAN, _mean, (torch.mean, "mean"))
_functions(SIGMOID, _unary(SIGMOID), (torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"))
_functions(HARDSIGMOID, _unary(HARDSIGMOID), (F.hardsigmoid, "hardsigmoid", "hardsigmoid_"))
_functions(TANH, _unary(TANH), (torch.tanh, F.tanh, "tanh", "tanh_"))
_functions(SOFTMAX, _softmax, (torch.softmax, F.softmax, "softmax"))
_functions(HARDSWISH, _unary(HARDSWISH), (F.hardswish,))
_functions(SILU, _unary(SILU), (F.silu,))
_functions(GELU, _gelu, (F.gelu,))
_functions(LEAKY_RELU, _leaky_relu, (F.leaky_relu, F.leaky_relu_))
_functions(ELU, _elu, (F.elu, F.elu_))
_functions(INTERPOLATE, _interpolate, (F.interpolate, F.upsample))
_functions(PAD, _pad, (F.pad,))
_functions(FLATTEN, _flatten, (torch.flatten, "flatten"))
_functions(UNFLATTEN, _unflatten, (torch.unflatten, "unflatten"))
_functions(RESHAPE, _shape_args(RESHAPE), (torch.reshape, "reshape", "view"))
_functions(PERMUTE, _shape_args(PERMUTE), (torch.permute, "permute"))
_functions(TRANSPOSE, _transpose, (torch.transpose, "transpose", torch.swapaxes, "swapaxes"))
_functions(SQUEEZE, _squeeze, (torch.squeeze, "squeeze"))
_functions(UNSQUEEZE, _unsqueeze, (torch.unsqueeze, "unsqueeze"))
_functions(CHUNK, _chunk, (torch.chunk, "chunk"))
_functions(SPLIT, _split, (torch.split, "split"))
_functions(GETITEM, _getitem, (operator.getitem,))
_functions(NARROW, _narrow, (torch.narrow, "narrow"))
_functions(PIXEL_SHUFFLE, _factor(PIXEL_SHUFFLE), (F.pixel_shuffle,))
_functions(PIXEL_UNSHUFFLE, _factor(PIXEL_UNSHUFFLE), (F.pixel_unshuffle,))
_functions(CHANNEL_SHUFFLE, _factor(CHANNEL_SHUFFLE), (torch.channel_shuffle,))
_functions(None, _dropout, (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout))

for _n in (1, 2, 3):
    _module(
        CONV[_n - 1], _conv(_n), getattr(nn, f"Conv{_n}d"), "stride padding dilation groups padding_mode", "weight bias"
    )
    _module(
        CONV_TRANSPOSE[_n - 1], _conv_transpose(_n), getattr(nn, f"ConvTranspose{_n}d"),
        "stride padding output_padding groups dilation", "weight bias",
    )  # fmt: skip
    _module(
        BATCH_NORM, _batch_norm, getattr(nn, f"BatchNorm{_n}d"), "training momentum eps",
        "running_mean running_var weight bias",
    )  # fmt: skip
    _module(
        MAX_POOL[_n - 1], _max_pool(_n), getattr(nn, f"MaxPool{_n}d"),
        "kernel_size stride padding dilation ceil_mode return_indices",
    )  # fmt: skip
    _module(
        AVG_POOL[_n - 1], _avg_pool(_n), getattr(nn, f"AvgPool{_n}d"),
        "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    )  # fmt: skip
    _module(ADAPTIVE_AVG_POOL[_n - 1], _adaptive_avg_pool(_n), getattr(nn, f"AdaptiveAvgPool{_n}d"), "output_size")
    _module(PAD, _pad, getattr(nn, f"ZeroPad{_n}d"), "padding")
    for _mode, _class in (("reflect", f"ReflectionPad{_n}d"), ("replicate", f"ReplicationPad{_n}d")):
        _module(PAD, functools.partial(_pad, mode=_mode), getattr(nn, _class), "padding")
_module(LINEAR, _linear, nn.Linear, tensors="weight bias")
_module(CLAMP, _relu, nn.ReLU, "inplace")
_module(CLAMP, _relu6, nn.ReLU6, "inplace")
_module(CLAMP, _hardtanh, nn.Hardtanh, "min_val max_val inplace")
_module(SIGMOID, _unary(SIGMOID), nn.Sigmoid)
_module(HARDSIGMOID, _unary(HARDSIGMOID), nn.Hardsigmoid, "inplace")
_module(TANH, _unary(TANH), nn.Tanh)
_module(SOFTMAX, _softmax, nn.Softmax, "dim")
_module(HARDSWISH, _unary(HARDSWISH), nn.Hardswish, "inplace")
_module(SILU, _unary(SILU), nn.SiLU, "inplace")
_module(GELU, _gelu, nn.GELU, "approximate")
_module(LEAKY_RELU, _leaky_relu, nn.LeakyReLU, "negative_slope inplace")
_module(ELU, _elu, nn.ELU, "alpha inplace")
_module(FLATTEN, _flatten, nn.Flatten, "start_dim end_dim")
_module(UNFLATTEN, _unflatten, nn.Unflatten, "dim unflattened_size")
_module(INTERPOLATE, _interpolate, nn.Upsample, "size scale_factor mode align_corners recompute_scale_factor")
_module(INTERPOLATE, _interpolate, nn.UpsamplingNearest2d, "size scale_factor mode align_corners")
_module(INTERPOLATE, _interpolate, nn.UpsamplingBilinear2d, "size scale_factor mode align_corners")
_module(PIXEL_SHUFFLE, _factor(PIXEL_SHUFFLE), nn.PixelShuffle, "upscale_factor")
_module(PIXEL_UNSHUFFLE, _factor(PIXEL_UNSHUFFLE), nn.PixelUnshuffle, "downscale_factor")

#: Modules that hand on what they get, in evaluation mode.
PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_module(None, _identity, nn.Identity)
for _dropout_module in PASSING[1:]:
    _module(None, _dropout, _dropout_module, "p training")


def pattern_keys(pattern: Pattern) -> tuple[object, ...]:
    """A pattern as what ``operators.anchor_key`` gives for its nodes, in the order of execution."""
    elements = pattern if isinstance(pattern, tuple) else (pattern,)
    return tuple(
        element if isinstance(element, Operator) else _OPERATOR_OF_FORM.get(element, element) for element in elements
    )
