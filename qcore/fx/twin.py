"""Twins: copies of a model that a preparation may run, so that the user's own never changes.

A twin has modules and Python state of its own. What it has for a tensor is up to who makes it: the parameters of a
model that is run may be the user's (memory stays flat), where it is sure that nothing writes into them.
"""

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcore.fx.graph_module import modules_of

Counterpart = Callable[[Tensor], Tensor]
T = TypeVar("T")

_ATOMS = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type, range, slice, type(...), torch.dtype, torch.device,
        torch.Size, types.BuiltinFunctionType, types.ModuleType,
    }
)  # fmt: skip


def cloned(tensor: Tensor) -> Tensor:
    """A copy, also of a tensor that was computed from parameters, which deepcopy refuses."""
    if not tensor.is_leaf or (type(tensor) is Tensor and not tensor.requires_grad and not tensor.__dict__):
        return tensor.detach().clone()  # Many times faster.
    return copy.deepcopy(tensor)


def shared(tensor: Tensor) -> Tensor:
    """A tensor of its own on the same numbers."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return tensor
    alias = tensor.detach()
    if type(tensor) is nn.Parameter:
        alias = nn.Parameter(alias, tensor.requires_grad)
    elif tensor.requires_grad and tensor.is_leaf:
        alias.requires_grad_()
    if tensor.__dict__:
        alias.__dict__.update(tensor.__dict__)
    return alias


def with_shared_parameters(tensor: Tensor) -> Tensor:
    """The same numbers for a parameter, a copy of any other tensor."""
    return shared(tensor) if isinstance(tensor, nn.Parameter) else cloned(tensor)


class Copies:
    """Copies of tensors, one for each: what is shared between modules stays shared between their copies."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, cloned(tensor)  # With the tensor, lest another gets its identity.
        return self._made[id(tensor)][1]

    def forget(self) -> None:
        """Let go of all tensors: what made the copies may be held by cycles."""
        self._made.clear()

    def make_as_new(self) -> None:
        """Undo what was written into the copies."""
        with torch.no_grad():
            for tensor, copied in self._made.values():
                if copied.is_inference() or copied._version:
                    copied.copy_(tensor)


def twin_of(value: T, counterpart: Counterpart = cloned, memo: dict[int, Any] | None = None) -> T:
    """A copy of a model, its hooks and attributes included; what can't be copied (a lock, an open file) is shared.

    Args:
        value: the model, or anything that a model has; isn't changed.
        counterpart: what the copy has for a tensor.
        memo: what it has for others, by identity, as for ``copy.deepcopy``; is added to.
    """
    twin: T = _Copier(counterpart, {} if memo is None else memo).value(value)
    return twin


def uncompiled(model: nn.Module) -> nn.Module:
    """The model without ``torch.compile`` around it or around modules in it: one with the same tensors."""
    if not any(_compiled_from(module) is not None for module in modules_of(model)):
        return model
    return twin_of(model, lambda tensor: tensor)


def _compiled_from(module: nn.Module) -> nn.Module | None:
    if not type(module).__module__.startswith("torch._dynamo"):
        return None  # Importing that, to ask for its class, takes seconds.
    return module._modules.get("_orig_mod")


class _Copier:
    def __init__(self, counterpart: Counterpart, memo: dict[int, Any]) -> None:
        self.counterpart = counterpart
        self.memo = memo

    def value(self, value: Any) -> Any:
        """The copy of anything."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, nn.Module):
            compiled_from = _compiled_from(value)
            return self.module(value) if compiled_from is None else self.value(compiled_from)
        made: Any
        if isinstance(value, Tensor):
            made = self.memo[id(value)] = self.counterpart(value)
        elif kind is dict or kind is OrderedDict:
            made = self.memo[id(value)] = kind()
            for key, item in value.items():
                made[self.value(key)] = self.value(item)
        elif kind is list:
            made = self.memo[id(value)] = []
            made.extend(self.value(item) for item in value)
        elif kind is tuple or kind is set or kind is frozenset:
            made = kind(self.value(item) for item in value)
        elif kind is types.FunctionType:
            made = self.function(value)
        elif kind is types.MethodType:
            made = types.MethodType(value.__func__, self.value(value.__self__))
        elif kind is functools.partial:
            keywords = {name: self.value(item) for name, item in value.keywords.items()}
            made = functools.partial(self.value(value.func), *map(self.value, value.args), **keywords)
        elif kind is weakref.ref:
            target = self.memo.get(id(value()))
            made = value if target is None else weakref.ref(target)
        else:
            made = self.copied(value)
        return made

    def copied(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            return value

    def module(self, model: nn.Module) -> Any:
        """The copy of a module and of all inside, which may refer to each other: all are there before any is filled."""
        modules = modules_of(model, self.memo)
        plain = [module for module in modules if _is_plain(type(module))]  # type: ignore[arg-type]
        for module in plain:
            self.memo[id(module)] = object.__new__(type(module))
        if len(plain) < len(modules):  # Those that copy themselves find their tensors ready.
            for tensor in (*model.parameters(), *model.buffers()):
                self.value(tensor)
        for module in plain:
            state = module.__getstate__()
            for name, value in state.items():
                kind = type(value)
                if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value))):
                    continue
                # Most of what is left are registries without entries.
                state[name] = kind() if (kind is dict or kind is OrderedDict) and not value else self.value(value)
            vars(self.memo[id(module)]).update(state)
        return self.memo[id(model)] if id(model) in self.memo else self.copied(model)

    def function(self, function: types.FunctionType) -> types.FunctionType:
        """A function that refers to modules of the model, as hooks and patched forwards do, refers to their copies."""
        cells = function.__closure__
        if not cells:
            return function
        self.memo[id(function)] = function  # It may refer to itself.
        copies = [self.cell(cell) for cell in cells]
        if all(new is old for new, old in zip(copies, cells, strict=True)):
            return function
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(copies)
        )
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        self.memo[id(function)] = made
        return made

    def cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) in self.memo:
            return self.memo[id(cell)]  # type: ignore[no-any-return]
        try:
            found = cell.cell_contents
        except ValueError:
            return cell  # Not assigned yet.
        owner = found.__self__ if isinstance(found, types.MethodType) else found
        if not isinstance(owner, types.FunctionType) and not (isinstance(owner, nn.Module) and id(owner) in self.memo):
            return cell  # What else a function keeps is no part of the model.
        made = self.value(found)
        if made is found:
            return cell
        self.memo[id(cell)] = types.CellType(made)
        return self.memo[id(cell)]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1024)
def _is_plain(cls: type) -> bool:
    """Whether the copy of a module is one with copies of all in its dictionary."""
    if issubclass(cls, torch.jit.ScriptModule) or hasattr(cls, "__deepcopy__"):
        return False
    has_slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    usual: list[tuple[type, str]] = [(nn.Module, "__getstate__"), (object, "__reduce__"), (object, "__reduce_ex__")]
    return not has_slots and all(getattr(cls, name) is getattr(owner, name) for owner, name in usual)
