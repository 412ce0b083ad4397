"""The first pass: a module's forward as a graph of operators in normal form.

Every call of a known module, function or method becomes one call of its operator (see ``operators.py``), with the
module's weights as ``get_attr`` nodes that keep their path (``features.0.weight``). Dropout and identity in
evaluation mode disappear. An in-place form becomes the plain one, and whoever reads what was overwritten later, by
whatever name, reads the result instead (``aliases.py``). Each node remembers in ``meta["origin"]`` how the user wrote
it, which is what a QConfigMapping speaks of.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Scope, ScopeContextManager
from torch.utils import _pytree as pytree

from qcore.errors import TraceError
from qcore.fx.aliases import Aliases
from qcore.fx.effects import is_harmless, refuse_state
from qcore.fx.example_tracer import SIZE_METHODS, ExampleTracer
from qcore.fx.graph_module import NO_TENSORS, QGraphModule, get_attribute, submodule
from qcore.fx.guard import aside, guarded, memory_of
from qcore.fx.hooks import hook_of
from qcore.fx.inplace import LASTING, MAKING, TURNING, fresh, given, name_of, not_in_place, with_view, writes_in_place
from qcore.fx.nodes import drop_unread, identifiers, set_arguments, unshadowed
from qcore.fx.operators import FORMS, MODULES, kept_apart
from qcore.fx.roots import Root, Source
from qcore.fx.signature import CallSignature, Leaf, SignatureCodeGen, Structure, check_size
from qcore.fx.twin import Copies, shared, twin_of
from qcore.fx.values import UndecidableError, Value, is_value
from qcore.qconfig_mapping import ObjectType

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype})
_OWN_FUNCTIONS = (check_size, given, *MAKING, *LASTING)
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
#: Where the result of ``trace`` says whether its forward is harmless; see ``effects.is_harmless``.
HARMLESS = "qcore_harmless"


@dataclass(frozen=True)
class Origin:
    """How and where the user wrote an operator.

    Attributes:
        object_type: the module class, function or method name.
        is_module: whether it was a module call.
        path: path of that module; for a function or method, of the module whose forward calls it.
        owner_path: path of the module that holds the called module, or whose forward calls the function or method.
        scope_type: class of the module whose forward makes the call; ``None`` for the model itself.
        index: number of earlier calls of ``object_type`` within ``owner_path``.
    """

    object_type: ObjectType
    is_module: bool
    path: str
    owner_path: str
    scope_type: type | None
    index: int


class NormalFormTracer(ExampleTracer):
    """An fx tracer that writes known operators in normal form.

    Args:
        leaf_names: paths of modules to keep as they are and not to look into.
        leaf_classes: classes of such modules.
        signature: how the forward is called; ``None`` if that isn't known: then every parameter is a tensor, and
            nothing is known of sizes.
        examples: the tensors of that call; they aren't changed.
        path: of the traced module within the user's model.
        calls: how often each type was called in each module so far; other parts of the model count on.
    """

    def __init__(
        self,
        leaf_names: Iterable[str] = (),
        leaf_classes: Iterable[type[nn.Module]] = (),
        signature: CallSignature | None = None,
        examples: Sequence[torch.Tensor] = (),
        path: str = "",
        calls: "Counter[tuple[str, ObjectType]] | None" = None,
    ) -> None:
        super().__init__(examples if signature is not None else None)
        self._leaf_names = frozenset(leaf_names)
        self._leaf_classes = tuple(leaf_classes)
        self._signature = signature
        self._path = path
        self._calls: Counter[tuple[str, ObjectType]] = Counter() if calls is None else calls
        self.aliases = Aliases(self, self._add_node, self._external)
        self._is_written = False
        self._attributes: dict[str, fx.Proxy] = {}
        self._tensor_paths: dict[int, str] = {}
        self._captured: dict[int, tuple[torch.Tensor, int, str]] = {}
        self._module_call: tuple[Origin, bool] | None = None  # Its origin, and whether it overwrites what it is given.
        self.failed_path: str | None = None

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The forward as a function of the tensors of its call, and those."""
        if self._signature is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        signature = self._signature
        names = identifiers(signature.tensor_names)
        tensors = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def call(root: nn.Module, *tensors: Any) -> Any:
            args, kwargs = signature.arguments(tensors)
            given, spec = pytree.tree_flatten((args, kwargs))
            if self._path:  # A part of the user's model may be a known module itself.
                result = self.call_module(root, lambda *a, **k: root_fn(root, *a, **k), tuple(args), kwargs)
            else:
                if hook_of(root):
                    raise UndecidableError(f"{type(root).__name__} has {hook_of(root)}, which runs at each call")
                result = root_fn(root, *args, **kwargs)
            left, left_spec = pytree.tree_flatten((args, kwargs))
            if left_spec != spec or not all(map(self._is_same, given, left)):
                raise UndecidableError("it changes a container among its arguments")
            return self._result(signature, result)

        return call, [self.root, *tensors]

    def _is_same(self, first: Any, second: Any) -> bool:
        if is_value(first) and is_value(second):
            return self.aliases.is_same(first.node, second.node)
        return first is second

    def _result(self, signature: CallSignature, result: Any) -> Any:
        result = pytree.tree_map_only(Value, self._opened, result)
        # A tensor that the forward made is a new one at each call.
        result = pytree.tree_map_only(
            torch.Tensor, lambda tensor: self.create_proxy("call_function", fresh, (tensor,), {}), result
        )
        values, spec = pytree.tree_flatten(result)
        structure = Structure(spec, tuple(Leaf("", True) if is_value(v) else Leaf("", False, v) for v in values))
        self.settle_all()
        if signature.is_plain and structure.is_plain:
            return result
        self.graph.set_codegen(SignatureCodeGen(signature, structure))
        return tuple(filter(is_value, values))

    def _opened(self, value: Value) -> Any:
        """A value as the tuple that it is, if it comes from a module that gives several tensors at once."""
        node = value.node
        several = (nn.MultiheadAttention, nn.RNNBase)
        if node.op != "call_module" or not isinstance(submodule(self.root, str(node.target)), several):
            return value
        return pytree.tree_map_only(Value, self._opened, tuple(value))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules, and those that the user named."""
        if self._is_opaque(m, module_qualified_name) or isinstance(m, nn.MultiheadAttention):
            return True
        name = type(m).__module__
        return name.startswith("torch.nn.") and not name.startswith("torch.nn.utils.") and not any(m.children())

    def _is_opaque(self, m: nn.Module, path: str) -> bool:
        # There is no Python to trace in a ScriptModule.
        return path in self._leaf_names or type(m) in self._leaf_classes or isinstance(m, torch.jit.ScriptModule)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Write a known module as its operator, keep an unknown one of torch as a leaf, and go into all others."""
        if self.is_evaluating:
            return forward(*args, **kwargs)
        path = "" if m is self.root else self.path_of_module(m)
        if self._is_opaque(m, path):
            return self._leaf(m, path, args, kwargs)
        form, hook = MODULES.get(type(m)), hook_of(m)
        if form is not None and not hook:
            try:
                call = form(m, lambda name: self._attribute(path, m, name), *args, **kwargs)
            except TypeError:
                call = None  # Arguments that the form doesn't know.
            if call is not None:
                origin = self._make_origin(type(m), True, path)
                if call.operator is None:
                    return call.args[0]
                self._module_call, name = (origin, call.inplace), path.replace(".", "_")
                return self.create_proxy("call_function", call.operator.function, call.args, {}, name)
        # A convolution whose call isn't one operator pads, by reflection for example, and calls one.
        is_convolution = isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if (form is not None and (hook or not is_convolution)) or (form is None and self.is_leaf_module(m, path)):
            return self._leaf(m, path, args, kwargs)
        try:
            if hook:
                raise UndecidableError(f"{type(m).__name__} has {hook}, which runs at each call")
            with ScopeContextManager(self.scope, Scope(path, type(m))):
                return forward(*args, **kwargs)
        except Exception:
            if self.failed_path is None:
                self.failed_path = path
            raise

    def _leaf(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        if m is self.root:
            hook = hook_of(m)
            reason = f"has {hook}, which runs at each call" if hook else "is not known to qcore"
            raise TraceError(f"{type(m).__name__} {reason}", path, None)
        is_inplace = getattr(m, "inplace", False) is True and type(m).__module__.startswith("torch.nn.")
        self._module_call = self._make_origin(type(m), True, path), is_inplace
        return self.create_proxy("call_module", path, args, kwargs)

    def _make_origin(self, object_type: ObjectType, is_module: bool, path: str) -> Origin:
        path = ".".join(step for step in (self._path, path) if step)
        # A module's calls are counted in the module that holds it, which may be a list that is never called itself.
        owner = path.rpartition(".")[0] if is_module else path
        index = self._calls[(owner, object_type)]
        self._calls[(owner, object_type)] += 1
        return Origin(object_type, is_module, path, owner, self.scope.module_type, index)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Trace ``root``; see ``fx.Tracer.trace``."""
        self._tensor_paths = _tensor_paths(root)
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A tensor that a forward reads, as a value of the graph; fx searches the whole model for each."""
        if isinstance(attr_val, torch.Tensor) and not self.is_evaluating and id(attr_val) in self._tensor_paths:
            return self._tensor(self._tensor_paths[id(attr_val)])
        return attr_val

    def create_arg(self, a: Any) -> Any:
        """An argument as the graph holds it; a tensor by its path, which fx would search the whole model for."""
        kind = type(a)
        if kind in _PLAIN or (kind is dict and not a):  # fx looks long at each of what most arguments are.
            return a
        if kind is tuple or kind is list:
            return kind([self.create_arg(item) for item in a])
        if issubclass(kind, fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            if id(a) in self._tensor_paths:
                return self._tensor(self._tensor_paths[id(a)]).node
            if not isinstance(a, nn.Parameter):
                return self._tensor(self._constant(a)).node
        return super().create_arg(a)

    def _constant(self, tensor: torch.Tensor) -> str:
        """The name of a tensor that the forward made; fx would leave it on the user's model."""
        version = 0 if tensor.is_inference() else tensor._version
        known = self._captured.get(id(tensor))
        if known is not None and known[1] == version:
            return known[2]
        if memory_of(tensor) in self.real_calls.written:
            raise UndecidableError("it writes data into a tensor of which it made a view before")
        name = f"._tensor_constant{len(self.constants)}"  # No path of the user's starts like this.
        with aside():
            self.constants[name] = tensor.detach().clone()  # The forward may change it, or it may be the user's.
        self._captured[id(tensor)] = (tensor, version, name)  # And another tensor may get its number once it is gone.
        return name

    def _attribute(self, path: str, module: nn.Module, name: str) -> fx.Proxy | None:
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is None and isinstance(vars(module).get(name), torch.Tensor):
            # Computed by a hook, as for a pruned layer, from tensors that stay as they are.
            target = f"{path}.{name}".lstrip(".")
            self.constants[target] = vars(module)[name].detach().clone()
            return self._tensor(target)
        if tensor is None:
            return None
        return self._tensor(self._tensor_paths.get(id(tensor), f"{path}.{name}"))

    def _tensor(self, target: str) -> fx.Proxy:
        if target not in self._attributes:
            self._attributes[target] = self.proxy(self._add_node("get_attr", target, (), {}))
        return self._attributes[target]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **options: Any) -> Any:
        """Record a call; a user's function that is kept whole for fx's sake (``fx.wrap``) is looked into."""
        if kind == "call_function" and self.has_examples and _is_users(target):
            writes = self.aliases.writes
            try:
                result = target(*args, **kwargs)
                if isinstance(result, Value):  # fx knows no other.
                    return result
            except Exception:  # What it adds to the graph until it fails is dead code, unless it writes.
                if self.aliases.writes > writes:
                    raise
        if kind == "call_method" and target in SIZE_METHODS and self._is_parameter(args[0]):
            # It has one size, and isn't read for that.
            return getattr(get_attribute(self.root, args[0].node.target), target)(*args[1:], **kwargs)
        try:
            proxy = super().create_proxy(kind, target, args, kwargs, *others, **options)
        finally:
            self._module_call = None  # A forward may go on after a call that failed.
        # What a write gives back is the overwritten tensor itself.
        return args[0] if self._is_written and isinstance(args[0], Value) else proxy

    def _is_parameter(self, value: Any) -> bool:
        if not self.has_examples or not is_value(value):
            return False
        return value.node.op == "get_attr" and value.node.target not in self.constants

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """Add a node; a call of a known function or method takes its normal form."""
        origin, call, is_module = None, None, self._module_call is not None
        self._is_written = is_written = is_turned = False
        if self._module_call is not None and kind != "get_attr":  # That is a tensor among the arguments of the call.
            origin, is_written = self._module_call
        if kind == "output":
            self.aliases.write_inputs()
        if self.aliases.writes:
            is_shape = target in SIZE_METHODS or (target is getattr and args[1] in ("shape", "dtype", "device"))
            args, kwargs = fx.map_arg((args, kwargs), self.aliases.latest if is_shape else self.aliases.current)
        if kind in ("call_function", "call_method") and not is_module and target not in _OWN_FUNCTIONS:
            origin = self._make_origin(target, False, self.scope.module_path)
            if kwargs.get("out") is not None:
                raise UndecidableError("it writes a result into out=...")
            try:
                form = FORMS.get(target)
                call = form(*args, **kwargs) if form is not None else None
            except (TypeError, ValueError):
                pass  # An unhashable callable, or arguments that the form doesn't know: the call stays as it is.
            if call is not None and call.operator is None:
                return call.args[0]  # type: ignore[no-any-return]
            is_written = writes_in_place(target, kwargs) or (call is not None and call.inplace)
        written: Any = args[0] if is_written and args else None
        if is_written and not isinstance(written, fx.Node):
            raise UndecidableError(f"it calls {name_of(target)}, which changes tensors in place")
        if call is not None and call.operator is not None:
            kind, target, args, kwargs = "call_function", call.operator.function, call.args, {}
        elif is_written and kind == "call_module":
            args = (self._add_node("call_method", "clone", (written,), {}, is_fresh=True), *args[1:])
        elif is_written and not is_module:
            if target == "requires_grad_":
                return args[0]  # type: ignore[no-any-return]
            is_turned = target in TURNING
            kind, target, args, kwargs = not_in_place(kind, target, args, kwargs)
        elif kind == "call_function" and not kwargs and not is_module:
            args, kwargs = kept_apart(target, args)
        node = self._add_node(kind, target, args, kwargs, origin, name, type_expr, is_written and not is_turned)
        if is_turned:
            self.aliases.rebind(written, node)
        elif is_written:
            node.meta["overwrites"] = True
            self.aliases.overwrite(written, node)
        self._is_written = is_written
        self.forget_released()
        return node

    def _add_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        origin: Origin | None = None,
        name: str | None = None,
        type_expr: Any | None = None,
        is_fresh: bool = False,
    ) -> fx.Node:
        node = unshadowed(super().create_node(kind, target, (), {}, name, type_expr))
        set_arguments(node, args, kwargs)  # Afterwards, as in ``new_node``.
        if origin is not None:
            node.meta["origin"] = origin
        self.note(node)
        if kind != "get_attr":
            self.aliases.joined(node, is_fresh)
        return node

    def _external(self, node: fx.Node) -> str:
        """What a tensor is called that a graph can't write; notes that another one is written by the graph."""
        if node.op != "get_attr":
            return ""
        if node.target not in self.constants:
            return str(node.target)
        (tensor,) = (tensor for tensor, _, name in self._captured.values() if name == node.target)
        memory = memory_of(tensor)
        others = any(t is not tensor and memory_of(t) == memory for t, _, _ in self._captured.values())
        if others or memory not in self.real_calls.made:
            return "a tensor outside of its modules"
        self.real_calls.written.add(memory)
        return ""


def _is_users(target: Any) -> bool:
    """Whether a function is Python of the user's: fx calls such a one only because it was wrapped."""
    module = getattr(target, "__module__", None) or ""
    is_library = module.partition(".")[0] in ("torch", "qcore", "math", "builtins", "_operator", "operator")
    return isinstance(target, FunctionType) and not is_library


def trace(
    model: nn.Module,
    leaf_names: Iterable[str] = (),
    leaf_classes: Iterable[type[nn.Module]] = (),
    signature: CallSignature | None = None,
    examples: Sequence[torch.Tensor] = (),
    *,
    path: str = "",
    calls: "Counter[tuple[str, ObjectType]] | None" = None,
    source: nn.Module | None = None,
    copies: Copies | None = None,
) -> QGraphModule:
    """Trace ``model`` into a GraphModule of its own, in normal form.

    Args:
        model: any module; it isn't changed.
        leaf_names: paths of submodules to keep whole.
        leaf_classes: classes of submodules to keep whole.
        signature: how it is called; ``None`` takes every parameter for a tensor of unknown size.
        examples: the tensors of that call.
        path: of ``model`` within the user's model, for the nodes' origins.
        calls: how often each type was called in each module so far; see ``NormalFormTracer``.
        source: has the tensors and modules of the result, if ``model`` was run since then.
        copies: makes the result's buffers and leaf modules, while parameters are those of ``source``; by default those,
            too, are copies.

    Raises:
        TraceError: the forward can't be traced; names the submodule, the source line and what to do.
    """
    tensors: list[torch.Tensor] = []

    def counterpart(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(shared(tensor))
        return tensors[-1]

    twins: dict[int, Any] = {}
    twin = twin_of(model, counterpart, twins)
    tracer = NormalFormTracer(leaf_names, leaf_classes, signature, examples, path, calls)
    places = Source(model if source is None else source, model, copies or Copies())
    tracer.leaf = places.leaf
    try:
        with guarded(tensors, real_calls=tracer.real_calls) as guard:
            graph = tracer.trace(twin)
            if guard.draws:
                raise UndecidableError("it draws random numbers, which a graph would hold as constants")
        refuse_state(model, twins)
        harmless = is_harmless(graph, tracer.leaf)
        drop_unread(graph)
        for node in list(graph.nodes):
            if node.target == "contiguous" and not any(user.target is with_view for user in node.users):
                node.replace_all_uses_with(node.args[0])  # Without writes a copy is as good as what it is of.
                graph.erase_node(node)
        root = Root(places, graph, tracer.constants, keeps_parameters=copies is not None)
    except Exception as error:
        raise _trace_error(error, tracer.failed_path or "", model) from error
    finally:
        vars(tracer).clear()  # Cycles hold it, and it holds the model and all that it computed.
    traced = QGraphModule.of(root, graph, is_raw=True)
    traced.meta[HARMLESS] = harmless
    return traced


def _trace_error(error: Exception, path: str, model: nn.Module) -> TraceError:
    """Which module failed, at which line of the user's, and what to do.

    Args:
        error: what failed.
        path: of the module whose forward failed.
        model: what was traced.
    """
    location = _user_location(error)
    where = f"{path!r} ({type(submodule(model, path)).__name__})" if path else f"the model ({type(model).__name__})"
    at = f" at {location}" if location else ""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TraceError(
        f"{type(model).__name__} can't be traced: the forward of {where} failed{at}: "
        f"{reason}. Keep that submodule whole with "
        f"prepare_custom_config=PrepareCustomConfig().set_non_traceable_module_names([{path!r}]), or rewrite the line",
        path,
        location,
        reason,
    )


def _tensor_paths(root: nn.Module) -> dict[int, str]:
    """Where a model has its tensors, by identity: the first place, and that of a parameter or buffer before others."""
    attributes: dict[int, str] = {}
    buffers: dict[int, str] = {}
    parameters: dict[int, str] = {}
    for path, module in root.named_modules():
        start = f"{path}." if path else ""
        for found, held in ((buffers, module._buffers), (parameters, module._parameters)):
            for name, tensor in held.items():
                if tensor is not None:
                    found.setdefault(id(tensor), start + name)
        for name, value in vars(module).items():
            if type(value) not in NO_TENSORS and isinstance(value, torch.Tensor):
                attributes.setdefault(id(value), start + name)
    return {**attributes, **buffers, **parameters}


def _user_location(error: Exception) -> str | None:
    """The innermost line outside torch and qcore."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES) and not frame.filename.startswith("<"):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None
