"""The signatures of the ways to write an operator that do more than put arguments in order (see ``operators.py``).

Each function has the signature of what the user calls (spatial ones after the number of dimensions) and gives the
arguments of the normal form in order, or ``None`` for a use that has no normal form and stays as it is. Arguments are
whatever a model gives, or nodes of a graph that stand for it: they have no types here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN001, ANN002

from typing import Any

import torch
from torch import fx

#: The arguments of an operator in normal form.
Arguments = tuple[Any, ...]


def _each(value, n) -> Any:
    """A size for each of ``n`` dimensions."""
    return (value,) * n if isinstance(value, int) else value


def _window(n, kernel_size, stride, padding) -> Arguments:
    """The sizes of a pool; without a stride its windows lie side by side."""
    kernel = _each(kernel_size, n)
    return kernel, kernel if stride is None or stride == [] else _each(stride, n), _each(padding, n)


def conv(
    n, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"
) -> Arguments | None:
    """``torch.conv2d`` and its like, and their modules."""
    if padding_mode != "zeros":
        return None  # The tracer goes into the module, which pads and then calls the function.
    return input, weight, bias, _each(stride, n), _each(padding, n), _each(dilation, n), groups


def conv_transpose(
    n, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> Arguments:
    """``torch.conv_transpose2d`` and its like, and their modules."""
    sizes = (_each(stride, n), _each(padding, n), _each(output_padding, n))
    return input, weight, bias, *sizes, groups, _each(dilation, n)


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Arguments | None:
    """``F.batch_norm``, by what it has learned."""
    if training or running_mean is None or running_var is None:
        return None
    return input, running_mean, running_var, weight, bias, training, 0.1 if momentum is None else momentum, eps


def clamp(input, min=None, max=None) -> Arguments | None:
    """``torch.clamp`` by numbers."""
    bounds = [bound for bound in (min, max) if bound is not None]
    is_by_numbers = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in bounds)
    return (input, min, max) if bounds and is_by_numbers else None


def binary(input, other, *, alpha=1) -> Arguments | None:
    """``torch.add`` without a factor, ``torch.mul``, ``torch.matmul``."""
    return (input, other) if alpha == 1 else None


def joined(tensors, dim=0) -> Arguments | None:
    """``torch.cat``, ``torch.stack``; a node stands for a whole tuple, such as what ``chunk`` gives."""
    if isinstance(tensors, fx.Node):
        return tensors, dim
    return (list(tensors), dim) if isinstance(tensors, (list, tuple)) else None


def max_pool(
    n, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Arguments | None:
    """``F.max_pool2d`` and its like."""
    window = _window(n, kernel_size, stride, padding)
    return None if return_indices else (input, *window, _each(dilation, n), ceil_mode)


def avg_pool(
    n, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Arguments:
    """``F.avg_pool2d`` and its like; that of one dimension takes no divisor."""
    args = (input, *_window(n, kernel_size, stride, padding), ceil_mode, count_include_pad)
    return args if n == 1 else (*args, divisor_override)


def adaptive_avg_pool(n, input, output_size) -> Arguments:
    """``F.adaptive_avg_pool2d`` and its like."""
    return input, _each(output_size, n)


def mean(input, dim=None, keepdim=False, *, dtype=None) -> Arguments | None:
    """``torch.mean`` over some dimensions."""
    if dtype is not None or dim is None:
        return None
    return input, (dim,) if isinstance(dim, int) else tuple(dim), keepdim


def softmax(input, dim=None, dtype=None) -> Arguments | None:
    """``torch.softmax`` in the dtype of its input."""
    return None if dim is None or dtype is not None else (input, dim)


def gelu(input, approximate="none") -> Arguments | None:
    """``F.gelu``, exactly."""
    return (input,) if approximate == "none" else None


def interpolate(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
) -> Arguments | None:
    """``F.interpolate``."""
    return None if recompute_scale_factor or antialias else (input, size, scale_factor, mode, align_corners)


def pad(input, pad, mode="constant", value=None) -> Arguments | None:
    """``F.pad``; only zero is sure to lie in the range of what it is put around."""
    if mode == "constant" and value not in (None, 0, 0.0):
        return None
    return input, tuple(pad) if isinstance(pad, (list, tuple)) else pad, mode, value


def sizes(input, *sizes) -> Arguments | None:
    """``Tensor.view`` and its like, whose sizes come as one sequence or as separate arguments."""
    if len(sizes) != 1 or isinstance(sizes[0], int) or (isinstance(sizes[0], fx.Node) and not _is_size(sizes[0])):
        return input, sizes
    (whole,) = sizes
    if isinstance(whole, torch.dtype):
        return None
    return input, tuple(whole) if isinstance(whole, (list, tuple)) else whole


def _is_size(node) -> bool:
    """Whether a node is a whole ``torch.Size`` (``x.shape``, ``x.size()``) rather than one entry of it."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"


def dropout(input, p=0.5, training=True, inplace=False) -> Arguments | None:
    """``F.dropout`` and its like, which hand on what they get in evaluation mode."""
    return None if training else (input,)
