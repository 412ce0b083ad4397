"""Who calls a converted model: a program, or something that wants to look into it.

A kernel is native code on packed weights: what traces operators, or computes without data, can't follow it there. So
vmap gets a call for each row, compilers a graph break (:mod:`qcore.fx.apart`), backward() an error, and whatever
else would see something other than what the model does gets an error at once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qcore.errors import NotSupportedError

# By name at each call they cost some microseconds more: after a network's kernels nothing of Python is in the caches.
_Module = nn.Module
_forward_ad = forward_ad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_autocasts = torch._C._is_any_autocast_enabled
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


_PLAIN = frozenset((Tensor, nn.Parameter))


def outside() -> Callable[..., Any]:
    """What calls a function outside of any compiled graph; for code that a compiler may be tracing."""
    from qcore.fx.apart import apart  # To import torch's compiler takes seconds.

    return apart  # type: ignore[no-any-return]


def are_plain(values: Iterable[Any]) -> bool:
    """Whether the tensors among them are of torch's own classes."""
    return all(type(value) in _PLAIN or not isinstance(value, Tensor) for value in values)


def is_watched() -> bool:
    """Whether this call is traced or transformed, or something sees each operator or each call of a module."""
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _tracing() is not None
        or _autocasts()
        or _forward_ad._current_level >= 0
        or _Module.__call__ is not _Module._wrapped_call_impl
    )


def watched(owner: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``run`` gives, if whoever watches can be told the truth.

    Args:
        owner: whose call it is.
        run: computes the result on plain tensors with data.
        args: of the call.
        kwargs: of the call.

    Raises:
        NotSupportedError: the call is traced, or its tensors have no data, or aren't plain ones.
    """
    watcher = _watcher(owner, args, kwargs)
    if watcher:
        raise opaque(watcher)
    return run(*args, **kwargs) if _transform() is None else _transformed(run, args, kwargs)


def opaque(watcher: str) -> NotSupportedError:
    """The error for what can't be told the truth."""
    return NotSupportedError(
        f"{watcher} can't look into a model that runs on a backend's kernels. Take the reference model, which consists "
        "of torch's operators: qcore.convert_to_reference_fx(prepared)"
    )


def _watcher(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What can't be told the truth, or nothing."""
    if _tracing() is not None:
        return "torch.jit.trace"
    for mode in _get_current_dispatch_mode_stack():
        if mode.is_infra_mode():
            return f"torch.export, make_fx or a tensor without data ({type(mode).__name__})"
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"a {type(tensor).__name__}"
    transform = _transform()
    if transform is not None:
        if transform.key() == torch._C._functorch.TransformType.Functionalize:
            return "torch.func.functionalize"
        if any(map(_is_wrapped, (*owner.parameters(), *owner.buffers()))):
            return "torch.func, with regard to weights,"
    if _forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "forward-mode differentiation (torch.func.jvp)"
    return ""


def _transformed(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result under ``torch.func``: of each row for vmap, without derivatives."""
    leaves, structure = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    built: Any = None

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal built
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        given_args, given_kwargs = tree_unflatten(given, structure)
        results, built = tree_flatten(run(*given_args, **given_kwargs))
        return tuple(results)

    results = _OnPlainTensors.apply(flat, *[leaves[place] for place in places])  # type: ignore[no-untyped-call]
    return tree_unflatten(results, built)


def _no_gradient() -> NotSupportedError:
    return NotSupportedError(
        "a gradient was asked for through a model that runs on a backend's kernels: integers have none. Take the "
        "reference model, whose gradient is straight through each rounding: qcore.convert_to_reference_fx(prepared). "
        "To train only what comes after the integers, call requires_grad_(False) on what comes before them"
    )


class _OnPlainTensors(torch.autograd.Function):
    """Calls a function of tensors that no transform of ``torch.func`` follows."""

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], run: Any, *tensors: Tensor) -> Any:
        rows = [
            [x if dim is None else x.select(dim, row) for x, dim in zip(tensors, in_dims[1:], strict=True)]
            for row in range(info.batch_size)
        ]
        made = [_OnPlainTensors.apply(run, *row) for row in rows]  # type: ignore[no-untyped-call]
        results = tuple(map(torch.stack, zip(*made, strict=True)))
        return results, (0,) * len(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise _no_gradient()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise _no_gradient()


class _NoGradient(torch.autograd.Function):
    """A copy of a tensor through which no gradient comes."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, needing: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise _no_gradient()


def needing_gradient(*values: Any) -> Tensor | None:
    """The first that is a tensor that needs a gradient."""
    return next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)


def without_gradient(result: Any, needing: Tensor | None) -> Any:
    """A kernel's result, of which ``backward()`` raises an error if a tensor that it is made of needs a gradient."""
    if isinstance(result, tuple):
        return tuple(without_gradient(entry, needing) for entry in result)
    if needing is None or not result.is_floating_point() or result.requires_grad:
        return result  # Integers hand the error on to what is made of them.
    return _NoGradient.apply(result, needing)  # type: ignore[no-untyped-call]
