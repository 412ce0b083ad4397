"""The parts of a model that are graphs: the whole model where that can be traced, else its largest submodules that can.

A part is proven before it is trusted: at every call in one run of the model on the example inputs, the traced graph
computes beside the module, on the same inputs, and must give the same to the last bit. What can't be traced, what isn't
the same, and what is called in several forms, is opened: it stays Python, and its submodules are tried in their turn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from qcore.errors import TraceError
from qcore.fx.costs import module_weights
from qcore.fx.graph_module import QGraphModule, modules_of, submodule
from qcore.fx.guard import aside, draws
from qcore.fx.names import own_names
from qcore.fx.operators import MODULES, PASSING
from qcore.fx.record import FloatFallback, record_of
from qcore.fx.runs import Runs
from qcore.fx.shapes import copied, difference, propagate_examples, run_model
from qcore.fx.signature import CallSignature, NotConstantError
from qcore.fx.tracer import Origin, trace
from qcore.fx.twin import Copies
from qcore.qconfig_mapping import ObjectType
from qcore.quantization_plan import PythonModule

NO_PYTHON = "there is no Python to trace in a ScriptModule"
_WEIGHTED = tuple(known for known, form in MODULES.items() if "weight" in form.tensors[:1])


@dataclass(eq=False)
class Part:
    """A module that was traced and proven.

    Attributes:
        path: of the module in the model.
        module: the module, as it is in the user's model.
        root: what was traced: the module, or what calls it.
        graph: what was traced; it has the module's own parameters.
        signature: how it is called.
        examples: the tensors of that call.
        trace_again: makes the graph anew.
        replay: runs such a graph on the examples.
        result: what that gave.
        is_random: whether it gives another result each time.
        attributes: names of what whoever has the module reads of it, beside calling it.
    """

    path: str
    module: nn.Module
    root: nn.Module
    graph: QGraphModule
    signature: CallSignature
    examples: list[Tensor]
    trace_again: Callable[[], QGraphModule]
    replay: Callable[[QGraphModule], Any]
    attributes: dict[str, None]
    result: Any = None
    is_random: bool = False

    def forget(self) -> None:
        """Let go of all that tracing made: functions that hold each other, and tensors with them."""
        vars(self).clear()


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
        parts: by path; ``""`` is the whole model.
        calls: how often each type was called in each module, but for functions in what stays Python.
        copies: of what the graphs don't share with the model.
        python: the modules that stay Python.
        python_calls: what they call that is no part and has no modules inside.
        other_weights: weights outside of all parts and of those calls.
    """

    parts: dict[str, Part]
    calls: "Counter[tuple[str, ObjectType]]"
    copies: Copies
    python: tuple[PythonModule, ...] = ()
    python_calls: tuple[PythonCall, ...] = ()
    other_weights: int = 0


def find_parts(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaf_names: Iterable[str] = (),
    leaf_classes: Iterable[type[nn.Module]] = (),
    preserved: Iterable[str] = (),
) -> Parts:
    """Trace a model whole, or else the largest of its submodules that can be.

    Args:
        model: in evaluation mode; it isn't changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        leaf_names: paths of modules to keep whole and float.
        leaf_classes: classes of such modules.
        preserved: names of attributes of the model that the user will read.

    Raises:
        ExampleInputsError: it doesn't run on the example inputs.
    """
    leaf_names, leaf_classes = (*leaf_names, *_leaves_of_graph(model)), tuple(leaf_classes)
    runs, copies = Runs(model), Copies()
    whole: Part | None = None
    try:
        signature = CallSignature.of(model, args, kwargs, type(model).__name__)
        examples = signature.bind(args, kwargs)
        calls: Counter[tuple[str, ObjectType]] = Counter()

        def again(calls: "Counter[tuple[str, ObjectType]] | None" = None) -> QGraphModule:
            return trace(model, leaf_names, leaf_classes, signature, examples, calls=calls, copies=copies)

        graph = again(calls)
        replay = partial(runs.replay, examples)
        whole = Part("", model, model, graph, signature, examples, again, replay, dict.fromkeys(preserved))
        runs.trust(graph)
    except Exception as error:
        reason = _reason("", model, error)
    expected = runs.run(lambda twin: run_model(twin, args, kwargs))
    if whole is not None:
        try:
            whole.result = whole.replay(whole.graph)
            problem = difference(expected, whole.result)
            if not problem:
                copies.make_as_new()
                return Parts({"": whole}, calls, copies)
            reason = PythonModule("", type(model).__name__, f"replayed on the example inputs, {problem}")
        except Exception as error:
            reason = _reason("", model, error)
    runs.trust(None)
    closed: dict[str, str] = {}
    while True:

        def search(twin: nn.Module) -> _Finder:
            finder = _Finder(twin, runs, copies, leaf_names, leaf_classes, closed)
            finder.run(args, kwargs)
            return finder

        finder = runs.run(search)
        # What was opened at a later call than its first kept its own modules from being tried at the first.
        news = finder.opened_late or _misfits(runs, finder.parts, args, kwargs, expected)
        if not news:
            break
        closed.update(news)
    copies.make_as_new()
    scripts = scripts_in(model)
    python = [reason, *finder.python.values()]
    python.extend(PythonModule(path, type(module).__name__, NO_PYTHON) for path, module in scripts.items())
    inside = {id(module) for part in finder.parts.values() for module in part.module.modules()}
    inside.update(id(module) for path in finder.noted for module in submodule(model, path).modules())
    other_weights = sum(module_weights(m, recurse=False) for m in model.modules() if id(m) not in inside)
    return Parts(finder.parts, finder.calls, copies, tuple(python), tuple(finder.python_calls), other_weights)


def scripts_in(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost ScriptModules, by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)}
    return {path: module for path, module in found.items() if path.rpartition(".")[0] not in found}


def _leaves_of_graph(model: nn.Module) -> list[str]:
    """What the tracer of a ready GraphModule kept whole stays whole."""
    if not isinstance(model, fx.GraphModule):
        return []
    targets = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    return [target for target in targets if not type(submodule(model, target)).__module__.startswith("torch.nn.")]


class _Finder:
    """One run of the model in which every called module is tried, largest first."""

    def __init__(
        self,
        model: nn.Module,
        runs: Runs,
        copies: Copies,
        leaf_names: tuple[str, ...],
        leaf_classes: tuple[type[nn.Module], ...],
        closed: dict[str, str],
    ) -> None:
        self.model = model
        self.runs = runs
        self.copies = copies
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
            with aside():
                reason, found = self.attempt(path, module, args, kwargs)
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
                own = submodule(self.runs.model, path)
                root, source, place = module, own, path
                if isinstance(module, nn.MultiheadAttention):
                    place, _, name = path.rpartition(".")
                    root, source = _Holder(name, module), _Holder(name, own)
                examples, before_it = copied(examples), Counter(calls)

                def traced(root: nn.Module, calls: "Counter[tuple[str, ObjectType]]") -> QGraphModule:
                    return trace(
                        root, inner, self.leaf_classes, signature, examples,
                        path=place, calls=calls, source=source, copies=self.copies,
                    )  # fmt: skip

                part = Part(
                    path, own, source, traced(root, calls), signature, examples,
                    lambda: traced(source, Counter(before_it)), partial(self.runs.replay, examples),
                    dict.fromkeys(plain_attributes(own)),
                )  # fmt: skip
                drawn = draws()
                part.result = propagate_examples(part.graph, examples)
                part.is_random = draws() > drawn
                self.parts[path] = part
                self.calls = calls
                return None, part.result
            if part.signature != signature:
                return PythonModule(path, type(module).__name__, "it is called in several forms"), None
            return None, propagate_examples(part.graph, examples, notes=False)
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

    def __init__(self, part: Part, module: nn.Module, reads: list[tuple[str, str]]) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(module))
        self.__dict__[_PART] = part, module, reads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_PART][0].graph(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        part, module, reads = self.__dict__.get(_PART, (None, None, None))
        if part is None or not hasattr(module, name):
            raise AttributeError(name)
        if name in module._parameters or name in module._buffers:
            part.attributes[name] = None
        else:
            reads.append((part.path, name))
        return getattr(module, name)


def _hidden_attributes(module: nn.Module) -> list[str]:
    """What the model around a module could read of it, and not of a graph in its place; tensors and modules move."""
    if isinstance(module, fx.GraphModule):
        return []
    spaces = (plain_attributes(module), *(vars(base) for base in type(module).__mro__ if base is not nn.Module))
    names = [name for name in sorted(own_names()) if not name.startswith("__")]  # Python's own are read of the class.
    return [name for name in names if any(name in space for space in spaces)]


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a model may read of a part beside calling it: everything but tensors and modules."""
    known = vars(nn.Module()).keys() | (own_names() if isinstance(module, fx.GraphModule) else set())
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name not in known and name != "forward" and not isinstance(value, (Tensor, nn.Module))
    }
    if isinstance(module, nn.MultiheadAttention):
        attributes["in_proj_bias"] = None  # Torch's transformer layers ask for it, and go by operators without.
    return attributes


def _misfits(
    runs: Runs, parts: dict[str, Part], args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> dict[str, str]:
    """The parts that the model can't do with in the place of its modules, with the reasons.

    The model may look for modules by their class, such as to record their outputs. Those that it misses are looked for
    by halves, so that not every part costs a run; once there were many runs, halves are given up as they are.
    """

    def problem_with(some: list[Part]) -> tuple[str, list[tuple[str, str]]]:
        return runs.run(lambda twin: _run_with_stubs(twin, some, args, kwargs, expected))

    problem, reads = problem_with(list(parts.values()))
    if not problem:
        return {path: f"its attribute {name} is read from outside" for path, name in reads}
    found: dict[str, str] = {}
    pending = [(list(parts.values()), problem)]
    left = 16 + 4 * len(parts).bit_length()
    while pending:
        some, problem = pending.pop(0)
        halves = [some[: len(some) // 2], some[len(some) // 2 :]] if len(some) > 1 and left >= 2 else []
        failing = [(half, why) for half in halves if (why := problem_with(half)[0])]
        left -= len(halves)
        pending.extend(failing)
        if not failing:
            found.update({part.path: f"with a graph in its place the model fails: {problem}" for part in some})
    return found


def _run_with_stubs(
    model: nn.Module, parts: Iterable[Part], args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> tuple[str, list[tuple[str, str]]]:
    """Run the model with parts in place: what went wrong, and what it read of them beside calling them."""
    reads: list[tuple[str, str]] = []
    modules = [(part, submodule(model, part.path)) for part in parts]
    replace_modules(model, {id(module): _Stub(part, module, reads) for part, module in modules})
    try:
        with torch.no_grad():
            return difference(expected, model(*copied(args), **copied(kwargs))), reads
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", reads


def why_unsuitable(model: nn.Module) -> list[str]:
    """Why a model isn't one to prepare."""
    if isinstance(model, torch.jit.ScriptModule):
        return [f"model: {NO_PYTHON}; give the module that it was scripted or traced from"]
    if not any(isinstance(m, FloatFallback) or record_of(m) is not None for m in modules_of(model)):
        return _lazy_parameters(model)
    problems = []
    for path, module in model.named_modules():
        at = f"its module {path!r}" if path else "it"
        record = record_of(module)
        if isinstance(module, FloatFallback) or (record is not None and not isinstance(module, QGraphModule)):
            return [f"model: {at} was prepared or converted already; give the float model"]
        if record is not None:
            problems.append(
                f"model: {at} is a {record.stage} model already; give the float model, and prepare it as a whole"
            )
    return problems + _lazy_parameters(model)


def _lazy_parameters(model: nn.Module) -> list[str]:
    if not any(is_lazy(p) for m in modules_of(model) for p in m._parameters.values() if p is not None):
        return []
    name = next(name for name, tensor in model.named_parameters() if is_lazy(tensor))
    return [f"model: its parameter {name!r} isn't initialized yet; run the model once, and load its weights"]


def keep_to_operators(host: nn.Module) -> None:
    """Let torch's transformer modules that stay Python call their modules, and no kernel in their place."""
    for module in modules_of(host):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of others, given by identity, wherever they are registered."""
    for owner in list(model.modules()):
        for name, module in owner._modules.items():
            if module is not None and id(module) in new:
                owner._modules[name] = new[id(module)]
