"""The parts of a model that are graphs: the whole model where that can be traced, else its largest submodules that can.

A part is proven before it is trusted: at every call in one run of the model on the example inputs, the traced graph
computes beside the module, on the same inputs, and must give the same to the last bit. What can't be traced, what isn't
the same, and what is called in several forms, is opened: it stays Python, and its submodules are tried in their turn.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore.errors import TraceError
from qcore.fx.costs import module_weights
from qcore.fx.forms import MODULES, PASSING
from qcore.fx.graph_module import QGraphModule, copied_values, submodule
from qcore.fx.names import own_names
from qcore.fx.shapes import copied, difference, propagate_examples
from qcore.fx.signature import CallSignature, NotConstantError
from qcore.fx.tracer import Origin, trace
from qcore.qconfig_mapping import ObjectType
from qcore.quantization_plan import PythonModule

_WEIGHTED = tuple(known for known, form in MODULES.items() if "weight" in form.tensors[:1])


@dataclass(eq=False)
class Part:
    """A module that was traced and proven.

    Attributes:
        path: of the module in the model.
        module: the module.
        graph: what was traced.
        signature: how it is called.
        examples: the tensors of that call.
        kept: names of its tensors that the model around it reads, too.
    """

    path: str
    module: nn.Module
    graph: QGraphModule
    signature: CallSignature
    examples: list[Tensor]
    kept: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class PythonCall:
    """A call of a module without modules inside, from a module that stays Python.

    Attributes:
        origin: as for a call in a graph.
        is_leaf: whether it is torch's own or one that the user wants whole, and so would be a leaf in a graph, too.
        reason: why that module itself isn't a graph; empty if it was never tried.
        weights: numbers in its weights; 0 for any call but the first.
    """

    origin: Origin
    is_leaf: bool
    reason: str
    weights: int


@dataclass(frozen=True, eq=False)
class Parts:
    """What became of a model.

    Attributes:
        model: the model itself where it is one part, else a copy whose modules the parts are of.
        parts: by path; ``""`` is the whole model.
        calls: how often each type was called in each module, but for functions in what stays Python.
        python: the modules that stay Python.
        python_calls: what they call that is no part and has no modules inside.
        other_weights: weights outside of all parts and of those calls.
    """

    model: nn.Module
    parts: dict[str, Part]
    calls: "Counter[tuple[str, ObjectType]]"
    python: tuple[PythonModule, ...] = ()
    python_calls: tuple[PythonCall, ...] = ()
    other_weights: int = 0


def find_parts(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Any,
    leaf_names: Iterable[str] = (),
    leaf_classes: Iterable[type[nn.Module]] = (),
) -> Parts:
    """Trace a model whole, or else the largest of its submodules that can be.

    Args:
        model: in evaluation mode; it isn't changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        expected: what the model gives on them.
        leaf_names: paths of modules to keep whole and float.
        leaf_classes: classes of such modules.
    """
    leaf_names, leaf_classes = (*leaf_names, *_leaves_of_graph(model)), tuple(leaf_classes)
    calls: Counter[tuple[str, ObjectType]] = Counter()
    try:
        with same_random_numbers():
            signature = CallSignature.of(model, args, kwargs, type(model).__name__)
            examples = signature.bind(args, kwargs)
            graph = trace(model, leaf_names, leaf_classes, signature, examples, calls=calls, copies=False)
        with same_random_numbers():
            problem = difference(expected, propagate_examples(graph, examples))
        if not problem:
            return Parts(model, {"": Part("", model, graph, signature, examples)}, calls)
        reason = PythonModule("", type(model).__name__, f"replayed on the example inputs, {problem}")
    except Exception as error:
        reason = _reason("", model, error)
    own = copy_of(model)
    closed: dict[str, str] = {}
    while True:
        finder = _Finder(own, leaf_names, leaf_classes, closed)
        with same_random_numbers():
            finder.run(args, kwargs)
        # What was opened at a later call than its first kept its own modules from being tried at the first.
        news = finder.opened_late or _misfits(own, finder.parts, args, kwargs, expected)
        if not news:
            break
        closed.update(news)
    python = [reason, *finder.python.values()]
    inside = {id(module) for part in finder.parts.values() for module in part.module.modules()}
    inside.update(id(module) for noted in finder.noted.values() for module in noted.modules())
    other_weights = sum(module_weights(m, recurse=False) for m in own.modules() if id(m) not in inside)
    return Parts(own, finder.parts, finder.calls, tuple(python), tuple(finder.python_calls), other_weights)


def _leaves_of_graph(model: nn.Module) -> list[str]:
    """What the tracer of a ready GraphModule kept whole stays whole."""
    if not isinstance(model, fx.GraphModule):
        return []
    targets = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    return [target for target in targets if not type(submodule(model, target)).__module__.startswith("torch.nn.")]


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of models that hold tensors computed from parameters, which deepcopy refuses."""
    return copy.deepcopy(model, copied_values(model))


class _Finder:
    """One run of the model in which every called module is tried, largest first."""

    def __init__(
        self,
        model: nn.Module,
        leaf_names: tuple[str, ...],
        leaf_classes: tuple[type[nn.Module], ...],
        closed: dict[str, str],
    ) -> None:
        self.model = model
        self.leaf_names = leaf_names
        self.leaf_classes = leaf_classes
        self.closed = closed
        self.parts: dict[str, Part] = {}
        self.python: dict[str, PythonModule] = {}
        self.calls: Counter[tuple[str, ObjectType]] = Counter()
        self.opened_late: dict[str, str] = {}
        self.python_calls: list[PythonCall] = []
        self.noted: dict[str, nn.Module] = {}
        self.is_inside = False

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        probed = [(path, module) for path, module in self.model.named_modules() if path and self.is_watched(module)]
        own = {path: module.__dict__.get("forward") for path, module in probed}
        try:
            for path, module in probed:
                watch = self.prober if _is_probable(module) else self.noter
                module.__dict__["forward"] = watch(path, module, module.forward)
            with torch.no_grad():
                self.model(*copied(args), **copied(kwargs))
        finally:
            for path, module in probed:
                if own[path] is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = own[path]

    def is_watched(self, module: nn.Module) -> bool:
        is_leaf = not any(True for _ in module.children()) or type(module) in self.leaf_classes
        return _is_probable(module) or (is_leaf and not isinstance(module, torch.jit.ScriptModule))

    def noter(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(path, module)
            return self.inside(forward, args, kwargs)

        return noted

    def note(self, path: str, module: nn.Module) -> None:
        """Note the call of a module by one that stays Python."""
        if self.is_inside:
            return
        key = (path.rpartition(".")[0], type(module))
        origin = Origin(type(module), True, path, key[0], None, self.calls[key])
        self.calls[key] += 1
        if type(module) not in PASSING:
            reason = self.python[path].reason if path in self.python else ""
            is_leaf = self.is_leaf(path, module) or type(module).__module__.startswith("torch.nn.")
            weights = 0 if path in self.noted else module_weights(module)
            self.python_calls.append(PythonCall(origin, is_leaf, reason, weights))
            self.noted[path] = module

    def prober(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        note = self.noter(path, module, forward)
        again = forward if any(True for _ in module.children()) else note

        def probe(*args: Any, **kwargs: Any) -> Any:
            if self.is_leaf(path, module):
                return note(*args, **kwargs)
            if self.is_inside or path in self.python:
                return again(*args, **kwargs)
            given = args, kwargs
            state = torch.random.get_rng_state()
            reason, found = self.attempt(path, module, args, kwargs)
            torch.random.set_rng_state(state)
            if reason is None:
                given = copied((args, kwargs))  # It may write into them, and would a second time.
                expected = self.inside(forward, args, kwargs)
                problem = difference(expected, found)
                if not problem:
                    return expected
                reason = PythonModule(path, type(module).__name__, f"replayed on the example inputs, {problem}")
            if self.parts.pop(path, None) is not None:
                self.opened_late[path] = reason.reason
            self.python[path] = reason
            return again(*given[0], **given[1])  # Its own modules are tried in this run.

        return probe

    def is_leaf(self, path: str, module: nn.Module) -> bool:
        return path in self.leaf_names or type(module) in self.leaf_classes

    def inside(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module whose own modules aren't to be tried."""
        before, self.is_inside = self.is_inside, True
        try:
            return forward(*args, **kwargs)
        finally:
            self.is_inside = before

    def attempt(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[PythonModule | None, Any]:
        """Trace a module or take the trace of an earlier call, and replay it; gives what it computes or what failed."""
        if path in self.closed:
            return PythonModule(path, type(module).__name__, self.closed[path]), None
        hidden = _hidden_attributes(module)
        if hidden:
            reason = f"its attribute {hidden[0]} would be hidden by that of a GraphModule in its place"
            return PythonModule(path, type(module).__name__, reason), None
        before, self.is_inside = self.is_inside, True
        try:
            signature = CallSignature.of(module, args, kwargs, f"{path} ({type(module).__name__})")
            examples = signature.bind(args, kwargs)
            part = self.parts.get(path)
            if part is None:
                calls = Counter(self.calls)
                inner = [name.removeprefix(f"{path}.") for name in self.leaf_names if name.startswith(f"{path}.")]
                root, place = module, path
                if isinstance(module, nn.MultiheadAttention):
                    place, _, name = path.rpartition(".")
                    root = _Holder(name, module)
                with same_random_numbers():
                    graph = trace(
                        root, inner, self.leaf_classes, signature, examples, path=place, calls=calls, copies=False
                    )
                part = Part(path, module, graph, signature, copied(examples))
                result = propagate_examples(graph, examples)
                self.parts[path] = part
                self.calls = calls
                return None, result
            if part.signature != signature:
                return PythonModule(path, type(module).__name__, "it is called in several forms"), None
            return None, propagate_examples(part.graph, examples)
        except Exception as error:
            return _reason(path, module, error), None
        finally:
            self.is_inside = before


class _Holder(nn.Module):
    """Calls a module that a graph holds as a leaf."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self.name](*args, **kwargs)  # type: ignore[misc]


def _is_probable(module: nn.Module) -> bool:
    """Whether a module may be worth a graph: it, or something in it, has a weight, and it is called as a module."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return True
    if type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children()):
        return type(module) in _WEIGHTED
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _reason(path: str, module: nn.Module, error: Exception) -> PythonModule:
    name = type(module).__name__
    if isinstance(error, NotConstantError):
        return PythonModule(path, name, str(error))
    if isinstance(error, TraceError):
        culprit = ".".join(step for step in (path, error.module_path) if step)
        return PythonModule(path, name, error.reason, error.location, culprit)
    return PythonModule(path, name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


#: Where a stub keeps its own; nobody has an attribute with a space.
_PART = "its part"


class _Stub(nn.Module):
    """Stands for a part while the model runs around it, and notes what the model reads of it."""

    def __init__(self, part: Part, reads: list[tuple[str, str]]) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(part.module))
        self.__dict__[_PART] = part, reads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_PART][0].graph(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        part, reads = self.__dict__.get(_PART, (None, None))
        if part is None or not hasattr(part.module, name):
            raise AttributeError(name)
        if name in part.module._parameters or name in part.module._buffers:
            part.kept.add(name)
        else:
            reads.append((part.path, name))
        return getattr(part.module, name)


def _hidden_attributes(module: nn.Module) -> list[str]:
    """What the model around a module could read of it, and not of a graph in its place; tensors and modules move."""
    if isinstance(module, fx.GraphModule):
        return []
    spaces = (plain_attributes(module), *(vars(base) for base in type(module).__mro__))
    return [name for name in sorted(own_names()) if any(name in space for space in spaces)]


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a model may read of a part beside calling it: everything but tensors and modules."""
    known = vars(nn.Module()).keys() | (own_names() if isinstance(module, fx.GraphModule) else set())
    return {
        name: value
        for name, value in vars(module).items()
        if name not in known and name != "forward" and not isinstance(value, (Tensor, nn.Module))
    }


def _misfits(
    model: nn.Module, parts: dict[str, Part], args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> dict[str, str]:
    """The parts that the model can't do with in the place of its modules, with the reasons."""
    problem, reads = _run_with_stubs(model, parts.values(), args, kwargs, expected)
    if not problem:
        return {path: f"its attribute {name} is read from outside" for path, name in reads}
    # The model may look for modules by their class, such as to record their outputs.
    found = {}
    for path, part in parts.items():
        alone, _ = _run_with_stubs(model, [part], args, kwargs, expected)
        if alone and path:
            found[path] = f"with a graph in its place the model fails: {alone}"
    if not found:
        found = {path: f"with graphs in place the model fails: {problem}" for path in parts}
    return found


def _run_with_stubs(
    model: nn.Module, parts: Iterable[Part], args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> tuple[str, list[tuple[str, str]]]:
    """Run the model with parts in place: what went wrong, and what it read of them beside calling them."""
    reads: list[tuple[str, str]] = []
    replaced = replace_modules(model, {id(part.module): _Stub(part, reads) for part in parts})
    try:
        with torch.no_grad(), same_random_numbers():
            return difference(expected, model(*copied(args), **copied(kwargs))), reads
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", reads
    finally:
        for owner, name, module in replaced:
            owner._modules[name] = module


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put modules in the place of others, given by identity, wherever they are registered; gives what was replaced."""
    found = [
        (owner, name, module)
        for owner in list(model.modules())
        for name, module in owner._modules.items()
        if module is not None and id(module) in new
    ]
    for owner, name, module in found:
        owner._modules[name] = new[id(module)]
    return found


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Leave the random numbers of the process as they were."""
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


@contextmanager
def comparable() -> Iterator[None]:
    """Let torch's transformer modules compute as a graph of their operators does, and not by a kernel of their own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with same_random_numbers():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
