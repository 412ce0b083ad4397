"""The verifier between the passes: after each, one check that the graph is sound, and is what the pass had to make.

A check only reads, and is linear in the graph. What it finds is a fault of qcore's or of a plugin's: a ``GraphError``;
rewrites with a fault are taken back instead. They are exact as mathematics, not to the last bit, and some come from
plugins. So the graph runs once more on the example inputs, and its results may differ by what rounding does.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qcore import ops
from qcore.errors import GraphError, PluginError
from qcore.fx.constraints import gives_float
from qcore.fx.expand import expand
from qcore.fx.fuse import FusionPattern, apply_patterns
from qcore.fx.graph_module import QGraphModule, get_attribute, own_attribute, submodule
from qcore.fx.names import give_way
from qcore.fx.operators import activation_inputs, is_tuple
from qcore.fx.parts import Part
from qcore.fx.record import Record
from qcore.fx.shapes import Example
from qcore.observer import ObserverBase
from qcore.quantization_plan import QuantizationPlan

#: How far a result may be from what it was, relative to its largest value.
TOLERANCE = 1e-4
#: How many of a result's integers may differ: what compares numbers that are almost the same may come out otherwise.
_FLIPPED = 1e-3

_DEQUANTIZE = (ops.dequantize_per_tensor, ops.dequantize_per_channel)
#: What makes another dtype of its input.
_QUANTIZE = (ops.quantize_per_tensor, ops.dynamic_quantize_dequantize, *_DEQUANTIZE)

_Rewrite = Callable[[QGraphModule], bool]


def lint(graph: fx.GraphModule, after: str) -> dict[fx.Node, Any]:
    """A graph is sound: it could be run, as far as that doesn't depend on its values.

    Args:
        graph: of any stage.
        after: the pass that made it.

    Returns:
        What its ``get_attr`` nodes read.

    Raises:
        GraphError: it isn't.
    """
    names: set[str] = set()
    seen: set[fx.Node] = set()
    attributes: dict[fx.Node, Any] = {}
    owners: dict[str, nn.Module] = {}
    edges = 0
    last = None
    for node in graph.graph.nodes:
        sources = node.all_input_nodes
        if last is not None and last.op == "output":
            raise GraphError(after, node.name, f"comes after the output {last.name!r}")
        if node.name in names:
            raise GraphError(after, node.name, "has the name of another node")
        for source in sources:
            if source not in seen:
                where = "comes after it" if source.graph is graph.graph else "is of another graph"
                where = "was erased" if source._erased else where
                raise GraphError(after, node.name, f"reads {source.name!r}, which {where}")
            if node not in source.users:
                raise GraphError(after, node.name, f"isn't known to {source.name!r}, which it reads")
        if node.op in ("get_attr", "call_module"):
            try:
                path, _, name = str(node.target).rpartition(".")
                if path not in owners:  # Most tensors are beside another.
                    owners[path] = submodule(graph, path)
                value = own_attribute(owners[path], name)
            except AttributeError:
                raise GraphError(
                    after, node.name, f"refers to {node.target!r}, which the module doesn't have"
                ) from None
            if node.op == "get_attr":
                attributes[node] = value
            elif not isinstance(value, nn.Module):
                raise GraphError(after, node.name, f"calls {node.target!r}, which is no module")
        edges += len(sources)
        names.add(node.name)
        seen.add(node)
        last = node
    if last is None or last.op != "output":
        raise GraphError(after, last.name if last is not None else "output", "is the last one, and no output")
    if edges != sum(len(node.users) for node in seen):
        for node in seen:
            for user in node.users:
                if user not in seen or node not in user.all_input_nodes:
                    raise GraphError(after, node.name, f"has {user.name!r} among its users, which doesn't read it")
    return attributes


def check_traced(graph: QGraphModule) -> None:
    """A graph that was traced, and run on the examples: every tensor that it is given or has is known.

    Raises:
        GraphError: the graph isn't sound, or an example is missing or isn't that of the tensor.
    """
    after = "trace"
    _check_attributes(lint(graph, after), after)
    for node in graph.graph.nodes:
        if node.op == "placeholder" and "example" not in node.meta:
            raise GraphError(after, node.name, "is an input and has no example")


def check_rewritten(graph: QGraphModule, before: Any, run: Callable[[], Any] | None = None) -> Any:
    """A graph that was expanded or fused: what was known of its values is so still.

    Args:
        graph: of which every node that was there before has its example, and new nodes may have one.
        before: what :func:`results` said; ``None`` if each run draws numbers of its own, by which sizes may differ.
        run: runs it on the examples, and notes those of new nodes; ``None`` if that isn't needed.

    Returns:
        What the run gave.

    Raises:
        GraphError: the graph isn't sound, or a value has another shape or dtype.
    """
    after = "expand and fuse"
    _check_attributes(lint(graph, after), after)
    claimed = {} if run is None else {node: node.meta.get("example") for node in graph.graph.nodes}
    found = None if run is None else run()
    if before is None:
        return found
    for node, example in claimed.items():
        if example is not None:
            _expect(node, example, example.dtype, after)
    (wanted, spec), (given, other) = map(pytree.tree_flatten, (before, results(graph)))
    if spec != other:
        raise GraphError(after, "output", "gives a result that is built otherwise")
    for want, have in zip(wanted, given, strict=True):
        if isinstance(want, Example) and want != have and not isinstance(have, _Unknown):
            raise GraphError(after, "output", f"gives {have}, and gave {want} before")
    return found


class _Unknown:
    """In the place of the example of a node that has none."""


def results(graph: fx.GraphModule) -> Any:
    """The examples of what a graph gives, built like it."""
    output = next(iter(reversed(graph.graph.nodes)))
    return fx.map_arg(output.args, lambda node: node.meta.get("example", _Unknown()))


def check_planned(graph: QGraphModule, plan: QuantizationPlan) -> None:
    """A plan: all that it speaks of is there, and what is to be integers has qparams.

    Raises:
        GraphError: a node isn't, or a weight is no tensor of the graph's own.
    """
    after = "plan"
    nodes = {node.name: node for node in graph.graph.nodes}
    planned = [(name, "a decision") for d in plan.decisions for name in (d.node, *d.nodes)]
    planned += [(name, "an observation") for o in plan.observations for name in (o.value, *(o.readers or ()))]
    planned += [(weight.node, "a weight") for weight in plan.weights]
    planned += [(name, "shared qparams") for name in plan.shared]
    planned += [(name, "an absorbed clamp") for names in plan.absorbed.items() for name in names]
    planned += [(name, "qparams at run time") for name in plan.dynamic]
    for name, what in planned:
        if name not in nodes:
            raise GraphError(after, name, f"isn't in the graph, and the plan has {what} for it")
    numbers = [*((o.value, o.qparams) for o in plan.observations), *plan.shared.items()]
    for name, number in numbers:
        if not 0 <= number < len(plan.qparams):
            raise GraphError(after, name, f"is to have qparams {number}, of {len(plan.qparams)}")
    given = {name for name, _ in numbers}
    for decision in plan.quantized:
        config = decision.dtype_config
        is_float = config is None or gives_float(config)
        if not is_float and decision.node not in given and not is_tuple(nodes[decision.node]):
            raise GraphError(after, decision.node, "is to give integers, and has no qparams")
    for weight in plan.weights:
        source = _argument(nodes[weight.node], weight.argument)
        if source is None or source.op != "get_attr":
            raise GraphError(after, weight.node, f"has no weight as its argument {weight.argument}")


def check_observed(graph: QGraphModule, plan: QuantizationPlan, observers: Mapping[int, str]) -> None:
    """A prepared graph: each observer stands where it was planned, and nowhere else.

    Args:
        graph: with observers.
        plan: that says where.
        observers: their names, by number of the qparams.

    Raises:
        GraphError: one doesn't, the graph isn't sound, or a value has another shape or dtype.
    """
    after = "observe"
    _check_attributes(lint(graph, after), after)
    nodes = {node.name: node for node in graph.graph.nodes}
    numbers = {name: number for number, name in observers.items()}
    standing: dict[tuple[str, int], fx.Node] = {}
    for node in nodes.values():
        if node.op == "call_module" and node.target in numbers:
            value = node.all_input_nodes[0]
            _expect(node, value.meta["example"], value.meta["example"].dtype, after)
            if not isinstance(submodule(graph, str(node.target)), ObserverBase):
                raise GraphError(after, node.name, f"calls {node.target!r}, which is no observer")
            standing[value.name, numbers[str(node.target)]] = node
    for planned in plan.observations:
        observer = standing.pop((planned.value, planned.qparams), None)
        if observer is None:
            raise GraphError(after, planned.value, f"has no observer for qparams {planned.qparams}")
        value = nodes[planned.value]
        others = [user for user in value.users if user is not observer]
        for reader in others if planned.readers is None else [nodes[name] for name in planned.readers]:
            if reader in value.users or reader not in observer.users:
                raise GraphError(after, reader.name, f"doesn't read {value.name!r} by its observer {observer.name!r}")
    for value_name, number in standing:
        raise GraphError(after, value_name, f"has an observer for qparams {number} that nobody planned")


def check_reference(graph: QGraphModule, prepared: QGraphModule, record: Record) -> None:
    """A reference model: integers wherever they are planned, and everything else as it was.

    Args:
        graph: of the reference model.
        prepared: what it was made of; the user may have given it other tensors than it had.
        record: with the plan.

    Raises:
        GraphError: it is something else, or isn't sound.
    """
    after = "convert"
    _check_attributes(lint(graph, after), after)
    nodes = {node.name: node for node in graph.graph.nodes}
    observers = set(record.observers.values())
    for before in prepared.graph.nodes:
        node = nodes.get(before.name)
        if before.op == "call_module" and before.target in observers:
            continue
        if node is None:
            readers = (r for user in before.users for r in (user.users if user.target in observers else (user,)))
            if before.op != "get_attr" and any(reader.name in nodes for reader in readers):
                raise GraphError(after, before.name, "is gone, and others read it")
            continue
        if (node.op, node.target) != (before.op, before.target):
            raise GraphError(after, node.name, f"is {node.op} {node.target}, and was {before.op} {before.target}")
        like = get_attribute(prepared, str(before.target)) if node.op == "get_attr" else before.meta.get("example")
        if isinstance(like, (Example, Tensor)):
            _expect(node, like, like.dtype, after)
    for node in nodes.values():
        if node.op == "call_module" and node.target in observers:
            raise GraphError(after, node.name, "is an observer, which isn't needed any more")
        if node.op == "call_function" and node.target in _QUANTIZE:
            value = _argument(node, 0)
            if value is not None and (example := value.meta.get("example")) is not None:
                dtype: Any = node.args[5] if node.target is ops.quantize_per_tensor else torch.float32
                _expect(node, example, dtype, after)
    _check_integers(nodes, prepared, record, after)


def _check_integers(nodes: Mapping[str, fx.Node], prepared: QGraphModule, record: Record, after: str) -> None:
    """Every planned value is quantized; what nobody reads may be gone."""
    plan, observers = record.plan, set(record.observers.values())
    originals = {node.name: node for node in prepared.graph.nodes}
    for name in dict.fromkeys((*(observation.value for observation in plan.observations), *plan.shared)):
        if (node := nodes.get(name)) is None:
            continue
        users = originals[name].users
        readers = users if name in plan.shared else [r for u in users if u.target in observers for r in u.users]
        is_quantized = any(user.target is ops.quantize_per_tensor for user in node.users)
        if not is_quantized and any(reader.name in nodes for reader in readers):
            raise GraphError(after, name, "isn't quantized, as planned")
        for reader in readers:
            if (found := nodes.get(reader.name)) is not None and found in node.users:
                raise GraphError(after, reader.name, f"reads {name!r} as float, and not as integers, as planned")
    for name in plan.dynamic:
        if name in nodes and activation_inputs(nodes[name])[0].target is not ops.dynamic_quantize_dequantize:
            raise GraphError(after, name, "reads what isn't quantized at run time")
    for weight in plan.weights:
        if (node := nodes.get(weight.node)) is None:
            continue
        dequantize, source = (_argument(n, weight.argument) for n in (node, originals[weight.node]))
        values = None if dequantize is None or dequantize.target not in _DEQUANTIZE else _argument(dequantize, 0)
        if values is None or source is None:
            raise GraphError(after, node.name, f"reads no integers as its argument {weight.argument}")
        want = Example.of(get_attribute(prepared, str(source.target))).shape
        if values.meta["example"].shape != want:
            raise GraphError(after, node.name, f"has a weight of {values.meta['example']}, and had one of {list(want)}")


def _argument(node: fx.Node, number: int) -> fx.Node | None:
    """The node that is an argument; ``None`` if that is none."""
    found = node.args[number] if number < len(node.args) else None
    return found if isinstance(found, fx.Node) else None


def _check_attributes(attributes: Mapping[fx.Node, Any], after: str) -> None:
    """Every tensor of a graph's own is what its example says."""
    for node, value in attributes.items():
        if isinstance(value, Tensor):
            _expect(node, value, value.dtype, after)


def _expect(node: fx.Node, like: Example | Tensor, dtype: torch.dtype, after: str) -> None:
    """A node's example has the shape of another, or of a tensor, and a dtype."""
    example = node.meta.get("example")
    if example is None or example.dtype is not dtype or example.shape != like.shape:
        wanted = Example(tuple(like.shape), dtype)
        raise GraphError(after, node.name, f"gives {example or 'what has no example'}, where {wanted} is expected")


def rewrite(
    part: Part, patterns: Sequence[FusionPattern], reserved: Collection[str] = ()
) -> tuple[QGraphModule, tuple[str, ...]]:
    """The graph of a part, expanded and fused, and notes on what was taken back.

    Args:
        part: its graph is changed.
        patterns: of the backend.
        reserved: names at which the graph's own tensors and modules mustn't stand.
    """
    give_way(part.graph, reserved)
    rewrites: dict[str, _Rewrite] = {"the expansion of operators": expand}
    for pattern in patterns:
        rewrites[f"the rewrite of {_name(pattern)}"] = lambda graph, own=pattern: apply_patterns(graph, [own])  # type: ignore[misc]
    problem = _problem(part, part.graph, lambda graph: expand(graph) | apply_patterns(graph, patterns))
    if not problem:
        return part.graph, ()
    notes, sound = [], []
    for name, single in rewrites.items():
        if why := _problem(part, _fresh(part, reserved), single):
            notes.append(f"{name} was taken back: {why}")
        else:
            sound.append(single)
    graph = _fresh(part, reserved)
    if not notes or _problem(part, graph, lambda graph: any([single(graph) for single in sound])):
        notes = [f"all rewrites were taken back, as together they change the model: {problem}"]
        graph = _fresh(part, reserved)
    return graph, tuple(notes)


def _fresh(part: Part, reserved: Collection[str]) -> QGraphModule:
    graph = part.trace_again()
    give_way(graph, reserved)
    part.replay(graph)
    check_traced(graph)
    return graph


def _name(pattern: FusionPattern) -> str:
    elements = pattern.pattern if isinstance(pattern.pattern, tuple) else (pattern.pattern,)
    names = [getattr(element, "name", None) or getattr(element, "__name__", element) for element in elements]
    return f"{' + '.join(map(str, names))} by {pattern.rewrite.__module__}.{pattern.rewrite.__qualname__}"


def _problem(part: Part, graph: QGraphModule, change: _Rewrite) -> str:
    """What a change of the graph (which says whether it has to be run) does to its results; empty if nothing."""
    before = None if part.is_random else results(graph)
    try:
        run = partial(part.replay, graph) if change(graph) else None
        found = check_rewritten(graph, before, run)
    except PluginError:
        raise
    except GraphError as error:
        return f"node {error.node!r} {error.problem}"
    except Exception as error:
        return f"with it the graph fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return "" if run is None or part.is_random else distance(part.result, found)


def distance(before: Any, after: Any) -> str:
    """How a result differs from another by more than rounding; empty if it doesn't."""
    wanted, spec = pytree.tree_flatten(before)
    given, other = pytree.tree_flatten(after)
    if spec != other:
        return "the result is built otherwise"
    return next(filter(None, map(_apart, wanted, given)), "")


def _apart(want: Any, have: Any) -> str:
    if not isinstance(want, Tensor) or not isinstance(have, Tensor):
        return (
            "" if type(want) is type(have) else f"a result is a {type(have).__name__}, and was a {type(want).__name__}"
        )
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"a result is {have.dtype}{list(have.shape)}, and was {want.dtype}{list(want.shape)}"
    if want.numel() == 0 or want.is_quantized:
        return ""
    if not (want.is_floating_point() or want.is_complex()):
        share = float((want != have).double().mean())
        return f"{share:.0%} of a result's integers are others" if share > _FLIPPED else ""
    # Half precision rounds more coarsely than that.
    allowed = max(TOLERANCE, 64 * torch.finfo(want.dtype).eps)
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(have)):
        return "a result is infinite or no number where it wasn't, or the reverse"
    kind = torch.complex128 if want.is_complex() else torch.float64
    want, have = want.detach()[finite].to(kind), have.detach()[finite].to(kind)
    if want.numel() == 0:
        return ""
    most, far = float(want.abs().max()), float((want - have).abs().max())
    return f"a result differs by {far:.2g}, where its largest value is {most:.2g}" if far > allowed * most else ""
