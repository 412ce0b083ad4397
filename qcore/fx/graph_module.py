"""The GraphModule that every pass works on: one that deep-copies and pickles with all that qcore knows about it."""

import copy
import functools
import importlib
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.compiler import is_dynamo_compiling

from qcore.dtypes import same_dtype
from qcore.errors import NotSupportedError
from qcore.fx.callers import outside
from qcore.fx.nodes import copied_graph
from qcore.fx.record import RECORD, Record, record_of

if TYPE_CHECKING:
    from qcore.fx.calls import Runner

#: Where a module keeps its modules and tensors.
REGISTRIES = ("_modules", "_parameters", "_buffers")

#: Attributes that a converted module gets, beside those that every QGraphModule has from the start.
LATER_ATTRIBUTES = ("_runner", "_straight", "_wrapped", "_call_of_raw", "_in_spec", "_out_spec", RECORD)


class QGraphModule(fx.GraphModule):
    """An fx GraphModule that keeps its graph, node names included, through pickling.

    fx pickles the generated code and traces it again, which gives nodes other names; a plan speaks of nodes by name.
    """

    #: What runs a converted graph; a library of kernels may have a class of its own, with another.
    _runner_class: "type[Runner] | None" = None

    def wrap_calls(self) -> None:
        """Put around calls what belongs to the stage of a module that a verb returns; see :mod:`qcore.fx.calls`."""
        if record_of(self) is None:
            return
        from qcore.fx.calls import call_of_raw, wrap_calls  # They work on this class.

        if vars(self).get("_is_raw"):
            type(self).__call__ = vars(self)["_call_of_raw"] = call_of_raw()  # type: ignore[method-assign]
        else:
            wrap_calls(self)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotSupportedError(
            "torch.jit.script reads source code, of which a graph has none. Take torch.export, or torch.jit.trace, and "
            "the reference model: qcore.convert_to_reference_fx(prepared)"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As any module's, such as for ``to``; but what a verb returned keeps the dtypes that it was prepared with.

        Scales in half precision would be other scales, and the graph was made for values of these dtypes.
        """
        is_made = record_of(self) is not None
        return super()._apply(same_dtype(fn) if is_made else fn, recurse)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph, *, is_raw: bool = False) -> "QGraphModule":
        """A module with the tensors and modules of ``root``, all of them and not copies, that runs ``graph``.

        Args:
            root: holds just what the graph refers to.
            graph: becomes the module's own.
            is_raw: leave out the code until it is needed: passes that only change the graph needn't pay for it.
        """
        module = cls.__new__(cls)
        vars(module)["_is_raw"] = True  # There is no need for the code of an empty graph.
        module.__init__(nn.Module(), fx.Graph())  # type: ignore[misc]
        module.graph.owning_module = None
        for registry in (*REGISTRIES, "_non_persistent_buffers_set"):
            vars(module)[registry].update(vars(root)[registry])
        module.training = root.training
        vars(module)["_is_raw"] = is_raw
        module.graph = graph
        # Without a cycle, what nobody holds is freed at once; a graph that is held longer belongs to no module then.
        disown = functools.partial(_disown, weakref.ref(graph))
        graph.owning_module = weakref.proxy(module, disown)  # type: ignore[assignment]
        return module

    @property
    def code(self) -> str:
        """The generated code; that of a raw module is made now."""
        self._finish_if_raw()
        return super().code

    def __str__(self) -> str:
        self._finish_if_raw()
        return super().__str__()

    def _finish_if_raw(self) -> None:
        if vars(self).get("_is_raw"):
            self.finish()

    def recompile(self) -> Any:
        """Make the code anew; that of a raw module is made when it is first called."""
        if vars(self).get("_is_raw"):
            type(self).forward = _ForwardWhenAsked(self)  # type: ignore[assignment]
            return None
        if vars(self).pop("_call_of_raw", None) is not None:
            del type(self).__call__
        code = super().recompile()
        self.wrap_calls()
        return code

    def finish(self) -> None:
        """Make the code of a module that may be raw."""
        vars(self)["_is_raw"] = False
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> "QGraphModule":
        result = memo[id(self)] = self._twin()
        vars(result).update(copy.deepcopy(self._state(), memo))
        return result

    def __copy__(self) -> "QGraphModule":
        result = self._twin()
        vars(result).update({name: _shallow(value) for name, value in self._state().items()})
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = [_frozen(node) for node in self.graph.nodes]
        return _thaw, (type(self).__base__, nodes, self.graph._codegen, self.meta, record_of(self)), self._state()

    def _twin(self) -> "QGraphModule":
        """A module with a copy of the graph, and none of the attributes."""
        base: type[QGraphModule] = type(self).__base__  # type: ignore[assignment]  # fx makes each module a class.
        result = base.of(nn.Module(), copied_graph(self.graph), is_raw=vars(self).get("_is_raw", False))
        result.meta.update(self.meta)
        return with_record(result, record_of(self))

    def _state(self) -> dict[str, Any]:
        """The attributes of the module, but for those that every QGraphModule makes by itself."""
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in _own_attributes()}


def with_record(module: QGraphModule, record: Record | None) -> QGraphModule:
    """Set what qcore knows about a graph, and return the module itself."""
    if record is not None:
        vars(module)[RECORD] = record
        module.wrap_calls()
    return module


class _ForwardWhenAsked:
    """The forward of a raw module: whoever looks at it (a call, a tracer, a compiler) has the code made.

    Every GraphModule has a class of its own, so that the class alone tells which module is meant.
    """

    def __init__(self, module: QGraphModule) -> None:
        self.module = weakref.ref(module)

    def __get__(self, instance: QGraphModule | None, owner: type[QGraphModule]) -> Callable[..., Any]:
        if is_dynamo_compiling():
            return self.outside_of_compilers
        module = self.module()
        assert module is not None
        module.finish()
        return owner.forward if instance is None else instance.forward

    def outside_of_compilers(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None
        return outside()(module, *args, **kwargs)


@dataclass(frozen=True)
class _Reference:
    """Stands for a node among the arguments of a frozen one."""

    name: str


@dataclass(frozen=True)
class _Function:
    """Stands for a function: pickle can't find operator overloads and some of torch's builtins by itself."""

    module: str
    qualified_name: str

    def resolve(self) -> Any:
        found: Any = importlib.import_module(self.module) if self.module else torch.ops
        for part in self.qualified_name.split("."):
            found = getattr(found, part)
        return found


def _disown(graph: "weakref.ref[fx.Graph]", _: Any) -> None:
    held = graph()
    if held is not None:
        held.owning_module = None


@functools.cache
def _own_attributes() -> frozenset[str]:
    made = vars(QGraphModule.of(nn.Module(), fx.Graph())).keys() - vars(nn.Module()).keys()
    return frozenset((*made, *LATER_ATTRIBUTES))


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, set)) else value


def _frozen(node: fx.Node) -> tuple[Any, ...]:
    def refer(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    args = fx.node.map_aggregate(node.args, refer)
    kwargs = fx.node.map_aggregate(node.kwargs, refer)
    target = _function_name(node.target) if node.op == "call_function" else node.target
    return node.name, node.op, target, args, kwargs, node.meta.get("example")


def _function_name(function: Any) -> Any:
    if isinstance(function, torch._ops.OpOverload):
        namespace, name = function._schema.name.split("::")
        return _Function("", f"{namespace}.{name}.{function._overloadname}")
    module, _, name = fx.node._get_qualified_name(function).rpartition(".")
    candidate = _Function(module, name)
    try:
        if candidate.resolve() is function:
            return candidate
    except (ImportError, AttributeError):
        pass
    pickle.dumps(function)  # Raises pickle's own error here, where the node is still known.
    return function


def _thaw(
    base: type[QGraphModule],
    nodes: list[tuple[Any, ...]],
    codegen: fx.graph.CodeGen,
    meta: dict[str, Any],
    record: Record | None,
) -> QGraphModule:
    graph = fx.Graph()
    graph.set_codegen(codegen)
    made: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Reference) else value

    for name, op, target, args, kwargs, example in nodes:
        target = target.resolve() if isinstance(target, _Function) else target
        args = fx.node.map_aggregate(args, resolve)
        made[name] = graph.create_node(op, target, args, fx.node.map_aggregate(kwargs, resolve), name)
        if example is not None:
            made[name].meta["example"] = example
    module = base.of(nn.Module(), graph)
    module.meta.update(meta)
    return with_record(module, record)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; many times faster than ``get_submodule``, which matters with thousands of them."""
    for step in path.split(".") if path else ():
        found = module._modules.get(step)
        module = getattr(module, step) if found is None else found
    return module


def get_attribute(module: nn.Module, target: str) -> Any:
    """The attribute at a dotted path."""
    owner_path, _, name = target.rpartition(".")
    return own_attribute(submodule(module, owner_path), name)


def own_attribute(owner: nn.Module, name: str) -> Any:
    """The attribute of a module; what is registered goes before an attribute of the class that may hide it."""
    for registry in (owner._parameters, owner._buffers, owner._modules):
        found = registry.get(name)
        if found is not None:
            return found
    return getattr(owner, name)


def has_attribute(module: nn.Module, target: str) -> bool:
    """Whether there is an attribute at a dotted path."""
    try:
        get_attribute(module, target)
    except AttributeError:
        return False
    return True


def computed(node: fx.Node, args: Any, kwargs: Any, root: nn.Module) -> Any:
    """What a node gives for these arguments; not for placeholders and outputs."""
    target: Any = node.target
    if node.op == "get_attr":
        return get_attribute(root, target)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    function = submodule(root, target) if node.op == "call_module" else target
    return function(*args, **kwargs)


def place_for(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, made with the modules on the way where they are missing."""
    for step in path.split(".") if path else ():
        found = module._modules.get(step)
        if found is None:
            found = module._modules[step] = nn.Module()
        module = found
    return module


def set_tensor(module: nn.Module, target: str, value: torch.Tensor, persistent: bool = True) -> None:
    """Put a tensor at a dotted path, as a buffer unless it is a Parameter; makes the modules on the way.

    Args:
        module: where the path starts.
        target: the path.
        value: the tensor.
        persistent: whether a state_dict holds it, if it is a buffer.
    """
    owner_path, _, name = target.rpartition(".")
    owner = place_for(module, owner_path)
    owner._parameters.pop(name, None)
    owner._buffers.pop(name, None)
    owner._non_persistent_buffers_set.discard(name)
    if isinstance(value, nn.Parameter):
        owner._parameters[name] = value
    else:
        owner._buffers[name] = value
        if not persistent:
            owner._non_persistent_buffers_set.add(name)


def is_persistent(module: nn.Module, target: str) -> bool:
    """Whether a state_dict holds the tensor at a dotted path."""
    owner_path, _, name = target.rpartition(".")
    return name not in submodule(module, owner_path)._non_persistent_buffers_set


def adopt(module: nn.Module, source: nn.Module, name: str, copied: Callable[[Any], Any] = lambda value: value) -> None:
    """Give a module the attribute of another, registered as it is there.

    Args:
        module: gets the attribute.
        source: has it.
        name: of the attribute.
        copied: makes the copy that the module gets; by default it is shared.
    """
    registry = next((vars(source)[r] for r in REGISTRIES if name in vars(source)[r]), None)
    value = getattr(source, name) if registry is None else registry[name]
    value = copied(value)
    own = next((vars(module)[r] for r in REGISTRIES if vars(source)[r] is registry), vars(module))
    own[name] = value
    if name in source._non_persistent_buffers_set:
        module._non_persistent_buffers_set.add(name)


def delete_tensor(module: nn.Module, target: str) -> None:
    """Drop the tensor at a dotted path."""
    owner_path, _, name = target.rpartition(".")
    owner = submodule(module, owner_path)
    del (owner._parameters if name in owner._parameters else owner._buffers)[name]


def own_tensors(module: nn.Module, foreign: nn.Module, copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace tensors that ``module`` shares with another by copies; those that a pass replaced are its own already."""
    theirs = {id(tensor) for tensor in tensors_of(foreign)}
    for owner in modules_of(module):
        registries: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for registry in registries:
            for name, tensor in registry.items():
                if id(tensor) in theirs:
                    registry[name] = copied(tensor)


#: The types of most of what a module has.
NO_TENSORS = frozenset({type(None), bool, int, float, str, tuple, set, dict, OrderedDict})


def modules_of(model: nn.Module, without: Collection[int] = ()) -> list[nn.Module]:
    """A model's modules, but for some (given by identity) and all in them; many times faster than ``modules``."""
    found, seen = [model], {id(model), *without}
    for module in found:  # It grows meanwhile.
        for inner in module._modules.values():
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return found


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """A model's parameters and buffers, and the tensors that are plain attributes of its modules."""
    found: list[Any] = []
    for module in modules_of(model):
        found.extend(module._parameters.values())
        found.extend(module._buffers.values())
        found.extend([value for value in vars(module).values() if type(value) not in NO_TENSORS])
    return [value for value in found if isinstance(value, torch.Tensor)]
