"""The GraphModule that every pass works on: one that deep-copies and pickles with all that qcore knows about it."""

import copy
import functools
import importlib
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from qcore.backend_config import BackendConfig
from qcore.errors import GuardError
from qcore.quantization_plan import PythonModule, QuantizationPlan


@dataclass(frozen=True)
class Preparation:
    """What ``prepare_fx`` settled and ``convert_fx`` must keep to.

    Attributes:
        stage: ``"prepared"``, ``"reference"`` or ``"converted"``.
        plan: the decisions.
        backend: name of the backend.
        backend_config: the capability that the plan was made for.
        is_custom_config: whether the user gave that config; then there is no lowering but the reference's.
        preserved: names of attributes of the float model that the user wanted kept.
        path: of the module in the user's model that this is a part of; ``""`` is the whole model.
    """

    stage: str
    plan: QuantizationPlan
    backend: str
    backend_config: BackendConfig
    is_custom_config: bool = False
    preserved: tuple[str, ...] = ()
    path: str = ""

    def at(self, stage: str, plan: QuantizationPlan | None = None) -> "Preparation":
        """The same, at another stage."""
        return replace(self, stage=stage, plan=plan or self.plan)


@dataclass(frozen=True)
class PartialPreparation:
    """What ``prepare_fx`` settled for a model that stays Python, with graphs in the place of some of its modules.

    Attributes:
        stage: as in :class:`Preparation`.
        python: the modules that aren't graphs.
        idle: plans of modules that could be graphs, but in which nothing is quantized, by path; they were left alone.
        other_weights: weights of convolutions and linear layers outside of all graphs.
    """

    stage: str
    python: tuple[PythonModule, ...]
    idle: Mapping[str, QuantizationPlan]
    other_weights: int


#: Where a model that stays Python keeps its :class:`PartialPreparation`.
PARTIAL = "_qcore_partial"


class QGraphModule(fx.GraphModule):
    """An fx GraphModule that keeps its graph, node names included, through pickling.

    fx pickles the generated code and traces it again, which gives nodes other names; a plan speaks of nodes by name.
    """

    @property
    def preparation(self) -> Preparation | None:
        """What qcore knows about this module; ``None`` for one that was only traced."""
        return self.meta.get("qcore")

    def with_preparation(self, preparation: Preparation) -> "QGraphModule":
        """Set what qcore knows, and return the module itself."""
        self.meta["qcore"] = preparation
        self.replay_calls()
        return self

    @property
    def replayed_forms(self) -> int:
        """For how many forms of calls (shapes, strides, dtypes) a converted module has a recording to replay."""
        executor = vars(self).get("_executor")
        return 0 if executor is None else int(executor.replayed_forms)

    def replay_calls(self) -> None:
        """Let a converted module run without Python between its operators, wherever that gives the same."""
        preparation = vars(self).get("meta", {}).get("qcore")
        if preparation is None or preparation.stage != "converted" or vars(self).get("_is_raw"):
            return
        forward = type(self).forward
        if forward is vars(self).get("_replayed"):
            return
        from qcore.replay.executor import NOTHING, Executor  # Here, as whoever converts nothing needn't wait for it.

        executor = vars(self)["_executor"] = Executor(self, forward)
        call = vars(self)["_call"] = type(self).__call__

        @functools.wraps(forward)  # Whoever asks for the signature, or traces the code, finds that.
        def replayed(self: QGraphModule, *args: Any, **kwargs: Any) -> Any:
            return executor(*args, **kwargs)

        def called(self: QGraphModule, *args: Any, **kwargs: Any) -> Any:
            # The way through torch's own call takes as long as all that is looked at before a replay.
            found = executor.replay(args, kwargs)
            return call(self, *args, **kwargs) if found is NOTHING else found

        type(self).forward = vars(self)["_replayed"] = replayed
        type(self).__call__ = called  # type: ignore[method-assign]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As any module's; calls then take torch's own way, which leads to what was compiled."""
        super().compile(*args, **kwargs)
        type(self).__call__ = vars(self).get("_call", type(self).__call__)  # type: ignore[method-assign]

    @staticmethod
    def of(root: nn.Module, graph: fx.Graph, *, is_raw: bool = False) -> "QGraphModule":
        """A module with the tensors and modules of ``root``, all of them and not copies, that runs ``graph``.

        Args:
            root: holds just what the graph refers to.
            graph: becomes the module's own.
            is_raw: leave out the code until it is needed: passes that only change the graph needn't pay for it.
        """
        module = QGraphModule.__new__(QGraphModule)
        vars(module)["_is_raw"] = True  # There is no need for the code of an empty graph.
        module.__init__(nn.Module(), fx.Graph())  # type: ignore[misc]
        module._modules.update(root._modules)
        module._parameters.update(root._parameters)
        module._buffers.update(root._buffers)
        module.training = root.training
        vars(module)["_is_raw"] = is_raw
        module.graph = graph
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
        code = super().recompile()
        self.replay_calls()
        return code

    def finish(self) -> None:
        """Make the code of a module that may be raw."""
        vars(self)["_is_raw"] = False
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> "QGraphModule":
        # fx copies what it knows of a GraphModule, and no attribute of the user's.
        result = super().__deepcopy__(memo)
        assert isinstance(result, QGraphModule)
        for name, value in self._preserved().items():
            setattr(result, name, copy.deepcopy(value, memo))
        result.replay_calls()
        return result

    def _preserved(self) -> dict[str, Any]:
        names = getattr(self.preparation, "preserved", ())
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {
            name: value
            for name, value in self.__dict__.items()
            if name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
        }
        kept = self._preserved()
        nodes = [_frozen(node) for node in self.graph.nodes]
        return _thaw, (attributes, kept, nodes, {"qcore": self.preparation}, self.graph._codegen)


class FloatFallback(nn.Module):
    """A model with a float one beside it, for calls in a form that it wasn't prepared for.

    Args:
        model: prepared or converted.
        float_model: what it was made of.
    """

    def __init__(self, model: nn.Module, float_model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.float_model = float_model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, or the float model's where a guard fails."""
        try:
            return self.model(*args, **kwargs)
        except GuardError:
            return self.float_model(*args, **kwargs)


class _ForwardWhenAsked:
    """The forward of a raw module: whoever looks at it (a call, a tracer, a compiler) has the code made.

    Every GraphModule has a class of its own, so that the class alone tells which module is meant.
    """

    def __init__(self, module: QGraphModule) -> None:
        self.module = weakref.ref(module)

    def __get__(self, instance: QGraphModule | None, owner: type[QGraphModule]) -> Callable[..., Any]:
        module = self.module()
        assert module is not None
        module.finish()
        return owner.forward if instance is None else instance.forward


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


def _frozen(node: fx.Node) -> tuple[Any, ...]:
    def refer(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    args = fx.node.map_aggregate(node.args, refer)
    kwargs = fx.node.map_aggregate(node.kwargs, refer)
    target = _function_name(node.target) if node.op == "call_function" else node.target
    return node.name, node.op, target, args, kwargs


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
    attributes: dict[str, Any],
    kept: dict[str, Any],
    nodes: list[tuple[Any, ...]],
    meta: dict[str, Any],
    codegen: fx.graph.CodeGen,
) -> QGraphModule:
    graph = fx.Graph()
    graph.set_codegen(codegen)
    made: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return made[value.name] if isinstance(value, _Reference) else value

    for name, op, target, args, kwargs in nodes:
        target = target.resolve() if isinstance(target, _Function) else target
        args = fx.node.map_aggregate(args, resolve)
        made[name] = graph.create_node(op, target, args, fx.node.map_aggregate(kwargs, resolve), name)
    root = nn.Module()
    root.__dict__.update(attributes)
    module = QGraphModule.of(root, graph)
    module.training = attributes["training"]
    for name, value in kept.items():
        setattr(module, name, value)
    module.meta.update({key: value for key, value in meta.items() if value is not None})
    module.replay_calls()
    return module


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; many times faster than ``get_submodule``, which matters with thousands of them."""
    for step in path.split(".") if path else ():
        found = module._modules.get(step)
        module = getattr(module, step) if found is None else found
    return module


def get_attribute(module: nn.Module, target: str) -> Any:
    """The attribute at a dotted path."""
    owner_path, _, name = target.rpartition(".")
    owner = submodule(module, owner_path)
    registered = owner._parameters.get(name, owner._buffers.get(name))
    return getattr(owner, name) if registered is None else registered


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


def set_tensor(module: nn.Module, target: str, value: torch.Tensor) -> None:
    """Put a tensor at a dotted path, as a buffer unless it is a Parameter; makes the modules on the way."""
    owner_path, _, name = target.rpartition(".")
    owner = place_for(module, owner_path)
    owner._parameters.pop(name, None)
    owner._buffers.pop(name, None)
    if isinstance(value, nn.Parameter):
        owner._parameters[name] = value
    else:
        owner._buffers[name] = value


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


#: Most of what a module has.
_NO_TENSORS = frozenset({type(None), bool, int, float, str, tuple, set, dict, OrderedDict})


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
        found.extend([value for value in vars(module).values() if type(value) not in _NO_TENSORS])
    return [value for value in found if isinstance(value, torch.Tensor)]


def free_name(taken: Mapping[str, Any] | set[str], wanted: str, counter: dict[str, int]) -> str:
    """``wanted``, or ``wanted_1``, ``wanted_2`` ...; the counter makes a run of clashes linear."""
    if wanted not in taken:
        return wanted
    number = counter.get(wanted, 0)
    while True:
        number += 1
        name = f"{wanted}_{number}"
        if name not in taken:
            counter[wanted] = number
            return name
