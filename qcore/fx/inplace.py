"""In-place forms, and what a graph calls in their place: it computes new values, and its inputs are written last.

A graph in which nothing is overwritten means the same in whatever order and on whatever memory its values lie, so the
passes may move, round and drop them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcore.errors import GuardError
from qcore.fx.values import INPLACE_OPERATORS, UndecidableError


def with_call(x: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """``x`` after a method that writes into it, as a new tensor."""
    result = x.clone()
    getattr(result, method)(*args, **kwargs)
    return result


def with_view(x: Any, value: Tensor, *steps: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
    """``x`` after ``value`` was written into a view of it, as a new tensor.

    Args:
        x: whose view it is; a tuple of tensors, too.
        value: what was written.
        steps: the methods that give the view, with their arguments.
    """
    tensors = pytree.tree_leaves(x)
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors):
        raise GuardError("the forward writes into one of several tensors that lie in the same memory: give them copies")
    view = result = pytree.tree_map(torch.clone, x)
    for method, args, kwargs in steps:
        view = getattr(view, method)(*args, **kwargs)
    view.copy_(value)
    return result


def fresh(x: Tensor) -> Tensor:
    """A constant that a forward makes, as a tensor that the caller may write into."""
    return x.clone()


def given(x: Tensor) -> Tensor:
    """An input that is written at the end, as all else reads it: nobody's rounding comes between it and the write."""
    return x


def write_back(x: Tensor, value: Tensor) -> Tensor:
    """Write into an input what the forward leaves in it."""
    return x.copy_(value)


def check_apart(written: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Compare the memory of inputs that a graph writes with that of all its inputs.

    Raises:
        GuardError: two overlap, so the forward would see in one what it writes into the other; the graph doesn't.
    """
    for x in written:
        start, end = _extent(x)
        for other in inputs:
            if other is not x or sum(entry is x for entry in inputs) > 1:
                first, last = _extent(other)
                if first < end and start < last:
                    raise GuardError(
                        "the forward writes into one of its inputs, which lies in the same memory as another. The "
                        "graph was traced for inputs that are apart: give it copies"
                    )


def _extent(x: Tensor) -> tuple[int, int]:
    if x.numel() == 0 or x.layout is not torch.strided:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


#: Those that make a new tensor.
MAKING = (with_call, with_view, fresh)

#: Those that a graph keeps although nothing reads their results.
LASTING = (write_back, check_apart)

_PLAIN_OPERATORS = dict(INPLACE_OPERATORS.values())
#: Methods that turn a tensor into a view of itself and write nothing.
TURNING = frozenset({"detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_"})
_REFUSED = frozenset({"as_strided_", "rename_", "resize_", "resize_as_", "set_", "apply_", "map_", "map2_"})


def writes_in_place(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument, by torch's way of naming."""
    if kwargs.get("inplace") is True or target == "__setitem__" or target in _PLAIN_OPERATORS:
        return True
    name = name_of(target)
    return name.endswith("_") and not name.endswith("__")


def name_of(target: Any) -> str:
    """What a function or method is called."""
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def not_in_place(
    kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """The call that computes what another writes into its first argument."""
    if target in _PLAIN_OPERATORS:
        return kind, _PLAIN_OPERATORS[target], args, kwargs
    if kwargs.get("inplace") is True:
        return kind, target, args, {name: value for name, value in kwargs.items() if name != "inplace"}
    name = name_of(target)
    if name in _REFUSED or not hasattr(torch.Tensor, name):
        raise UndecidableError(f"it calls {name}, which changes a tensor in place")
    # Of random numbers the two forms differ.
    if hasattr(torch.Tensor, name[:-1]) and name != "bernoulli_":
        return "call_method", name[:-1], args, kwargs
    return "call_function", with_call, (args[0], name, *args[1:]), kwargs
