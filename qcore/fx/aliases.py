"""Who sees a write: which values of a graph lie in the same memory, while it is traced.

The graph itself holds no writes. A write gives a new value, and from then on whoever reads the overwritten tensor reads
that; a view of it is taken again from the new value, and a tensor of which a view was written is computed with the
view's new value in it. So a name means what it means to Python, which sees every write through all of them.

What isn't sure to be a view (``reshape`` and ``contiguous`` copy where they must; an unknown function does as it
likes) has memory of its own that is linked to that of its inputs: after a write to one of them the others can't be
read any more, and the module stays Python.

Nothing is looked at before the first write, so a forward without any pays nothing.
"""

import operator
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from qcore.fx.example_tracer import NUMBER_MODULES, ExampleTracer
from qcore.fx.inplace import LASTING, MAKING, check_apart, given, name_of, with_view, write_back
from qcore.fx.operators import CAT, FLATTEN, GETITEM, MAX_POOL, PAD, RESHAPE, STACK, Kind, operator_of
from qcore.fx.values import UndecidableError

#: Methods that always give a view of a tensor, or several; functions of torch of these names do, too.
_VIEWS = frozenset(
    {
        "broadcast_to", "chunk", "detach", "diagonal", "expand", "expand_as", "hsplit", "moveaxis", "movedim", "narrow",
        "permute", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split",
        "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit",
    }
)  # fmt: skip
_VIEW_ATTRIBUTES = ("T", "data", "mT")
_HANDING_ON = (operator.getitem, operator.pos, getattr)
_COPYING_MOVES = (CAT, STACK, PAD, *MAX_POOL)


class _Memory:
    """The memory of one tensor, with all views of it.

    Attributes:
        origin: the node that gave it.
        writes: how many there were; a view that was taken before the last isn't up to date.
        lost: where it can't be read any more, why.
        links: memories that may be the same, each with the node that may have made a view and what it read.
    """

    def __init__(self, origin: fx.Node) -> None:
        self.origin = origin
        self.writes = 0
        self.lost = ""
        self.links: list[tuple[_Memory, fx.Node, fx.Node]] = []


class _View:
    """A tensor as Python knows it, whatever is written into it. It lives as long as a value or a view of it does.

    Attributes:
        memory: where it lies.
        parent: what it is a view of; ``None`` for the root of the memory.
        call: the node that gave it first.
        node: what it is now, or was after ``writes`` writes.
        writes: see there.
        turned: what its names mean since ``x.t_()`` or the like.
    """

    def __init__(self, tracer: ExampleTracer, memory: _Memory, parent: "_View | None", call: fx.Node) -> None:
        self.tracer = tracer
        self.memory = memory
        self.parent = parent
        self.call = self.node = call
        self.writes = memory.writes
        self.turned: _View | None = None
        tracer.hold(call)

    def set(self, node: fx.Node) -> None:
        """It is another node now, up to date."""
        self.tracer.hold(node)
        self.tracer.let_go(self.node)
        self.node, self.writes = node, self.memory.writes

    def __del__(self) -> None:
        self.tracer.let_go(self.node)


class Aliases:
    """The memory of the values of a graph.

    Args:
        tracer: that traces it.
        add_node: adds a node to the graph as it is.
        external: what a ``get_attr`` node reads, if that lives longer than a call; else ``""``.
    """

    def __init__(
        self, tracer: ExampleTracer, add_node: Callable[..., fx.Node], external: Callable[[fx.Node], str]
    ) -> None:
        self._tracer = tracer
        self._add_node = add_node
        self._external = external
        self.writes = 0
        self._views: WeakValueDictionary[fx.Node, _View] = WeakValueDictionary()
        self._named: dict[fx.Node, _View] = {}  # Those of nodes that a forward holds, and so may read.
        self._fresh: set[fx.Node] = set()
        self._written: dict[fx.Node, _View] = {}

    def forget(self, node: fx.Node) -> None:
        """A forward holds a node no more."""
        self._named.pop(node, None)

    def latest(self, node: fx.Node) -> fx.Node:
        """What has a value's present shape; its data may be of before a write."""
        view = self._view(node)
        return node if view is None else view.node

    def _view(self, node: fx.Node) -> _View | None:
        view = self._views.get(node)
        while view is not None and view.turned is not None:
            view = view.turned
        return view

    def is_same(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether two nodes are one tensor to Python, before and after writes."""
        view = self._view(first)
        return first is second or (view is not None and view is self._view(second))

    def is_item(self, node: fx.Node, of: fx.Node, index: Any) -> bool:
        """Whether a value is ``of[index]`` itself: Python writes it there once more at the end of ``x[0] += 1``."""
        view, parent = self._view(node), self._view(of)
        if view is None or parent is None or view.parent is not parent:
            return False
        return operator_of(view.call) is GETITEM and bool(view.call.args[1] == index)

    def current(self, node: fx.Node) -> fx.Node:
        """What to read in the place of a node.

        Raises:
            UndecidableError: that isn't known, since something that may be a view of it was written.
        """
        view = self._view(node)
        if view is None:
            return node
        memory, behind = view.memory, []
        while view.writes < memory.writes:
            if memory.lost:
                raise UndecidableError(memory.lost)
            behind.append(view)
            assert view.parent is not None  # The root is written with each write.
            view = view.parent
        source = view.node
        for view in reversed(behind):
            call = view.call
            args = (source, *call.args[1:])
            made = self._add_node(call.op, call.target, args, call.kwargs, call.meta.get("origin"), is_fresh=True)
            view.set(made)
            self._views[made] = view
            source = made
        return source

    def joined(self, node: fx.Node, is_fresh: bool) -> None:
        """A node was added: it may be a view of what was written, or will be; a fresh one is a view of nothing."""
        if is_fresh:
            self._fresh.add(node)
        elif self.writes and any(source in self._views for source in node.all_input_nodes) and self._sources(node):
            self._named[node] = self._place(node)  # It is about to become a value.

    def overwrite(self, node: fx.Node, by: fx.Node) -> None:
        """What ``node`` is was overwritten by a new value, which no other node is a view of.

        Raises:
            UndecidableError: the graph can't hold that.
        """
        alive = [] if node in self._views else self._explore(node)
        view = self._view(node)
        assert view is not None
        memory, root, steps = view.memory, view, []
        while root.parent is not None:
            steps.append(_as_method(root.call))
            root = root.parent
        self._lose_linked(memory)
        if name := self._external(memory.origin):
            raise UndecidableError(f"it writes into {name}, which it keeps for later calls")
        if memory.origin.op == "placeholder":
            self._written[memory.origin] = root
        self._views[by] = view
        if steps:
            by = self._add_node("call_function", with_view, (root.node, by, *reversed(steps)), {})
            self._views[by] = root
        self.writes += 1
        memory.writes += 1
        root.set(by)
        del alive

    def rebind(self, node: fx.Node, to: fx.Node) -> None:
        """A tensor was turned into a view of itself, as ``x.t_()`` does; other views of it stay as they are.

        Raises:
            UndecidableError: it belongs to the caller or the model.
        """
        self.writes += 1
        alive = [] if node in self._views else self._explore(node)
        root = self._views[node].memory.origin
        if root.op == "placeholder" or self._external(root):
            raise UndecidableError(f"it changes the shape of {root.target}, which isn't its own")
        view = self._views[node]
        view.turned = self._place(to)
        del alive

    def write_inputs(self) -> None:
        """At the end of a trace: let the graph write its inputs.

        Raises:
            UndecidableError: on the example inputs, an input that is written lies in another's memory.
        """
        written = {x: root.node for x, root in self._written.items()}
        if not written:
            return
        inputs = [node for node in self._tracer.graph.nodes if node.op == "placeholder"]
        if len(inputs) > 1:
            self._add_node("call_function", check_apart, (tuple(written), tuple(inputs)), {})
        last = inputs[-1]
        for x, value in written.items():
            with self._tracer.graph.inserting_after(last):
                own = self._add_node("call_function", given, (x,), {})
            x.replace_all_uses_with(own, lambda user: user.target is not given and user.target not in LASTING)
            made = self._add_node("call_function", write_back, (x, value), {})
            self._written[x].set(made)
            self._views[made] = self._written[x]

    def _explore(self, start: fx.Node) -> list[_View]:
        """Place a node and all that may lie in its memory; views live as long as the result or a forward's value do."""
        found, pending = {start}, [start]
        while pending:
            node = pending.pop()
            near = [source for source, _ in self._sources(node)]
            near.extend(user for user in node.users if any(source is node for source, _ in self._sources(user)))
            for other in near:
                if other not in found and other not in self._views:
                    found.add(other)
                    pending.append(other)
        return [self._place(node) for node in sorted(found)]  # In the order of the graph.

    def _place(self, node: fx.Node) -> _View:
        sources = self._sources(node)
        alive = [self._explore(source) for source, _ in sources if source not in self._views]
        if node in self._views:
            return self._views[node]
        certain = len(sources) == 1 and sources[0][1]
        parent = self._views[sources[0][0]] if certain else None
        memory = _Memory(node) if parent is None else parent.memory
        view = self._views[node] = _View(self._tracer, memory, parent, node)
        if self._tracer.is_held(node):
            self._named[node] = view
        for source, _ in () if certain else sources:
            other = self._views[source].memory
            memory.links.append((other, node, source))
            other.links.append((memory, node, source))
        del alive
        return view

    def _lose_linked(self, memory: _Memory) -> None:
        """What may be the same memory as one that is written can't be read from here on."""
        pending = [(memory, True)]
        seen = {id(memory)}
        while pending:
            current, is_same = pending.pop()
            for other, made, read in current.links:
                if id(other) in seen or other.lost:
                    continue
                seen.add(id(other))
                shares = is_same and self._tracer.shares(made, read)
                root = other.origin
                if shares and (root.op == "placeholder" or self._external(root)):
                    raise UndecidableError(
                        f"it writes into {root.target} through {name_of(made.target)}, which may copy"
                    )
                other.lost = (
                    f"{name_of(made.target)} may give a view of its input: one of them is written, and the other read"
                )
                other.writes += 1
                pending.append((other, shares))

    def _sources(self, node: fx.Node) -> tuple[tuple[fx.Node, bool], ...]:
        """The inputs that a node's value may be a view of, each with whether that is sure."""
        if node.op in ("placeholder", "get_attr", "output") or node in self._fresh or node.target in MAKING:
            return ()
        op = operator_of(node)
        if (op is not None and (op.kind is not Kind.MOVE or op in _COPYING_MOVES)) or self._tracer.is_size(node):
            return ()
        if getattr(node.target, "__module__", None) in NUMBER_MODULES and node.target not in _HANDING_ON:
            return ()  # Arithmetic.
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node):
            if _is_view(node):
                return ((source, True),)
            if op in (RESHAPE, FLATTEN) or node.target in ("contiguous", "reshape", "flatten"):
                return ((source, False),)
        return tuple((source, False) for source in node.all_input_nodes if self._tracer.shares(node, source))


def _name(node: fx.Node) -> str:
    if operator_of(node) is RESHAPE:
        origin = node.meta.get("origin")
        return "view" if getattr(origin, "object_type", None) == "view" else "reshape"
    if node.op == "call_function" and node.target is not getattr and operator_of(node) is not GETITEM:
        name = getattr(node.target, "__name__", "")
        return name if getattr(torch, name, None) is node.target else ""
    return str(node.target) if node.op == "call_method" else ""


def _is_view(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _VIEW_ATTRIBUTES
    if operator_of(node) is GETITEM:
        index = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        return all(part is None or part is ... or type(part) in (int, slice) for part in parts)
    return _name(node) in _VIEWS


def _as_method(call: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    if call.target is getattr:
        return "__getattribute__", (call.args[1],), {}
    name = "__getitem__" if operator_of(call) is GETITEM else _name(call)
    return name, tuple(call.args[1:]), dict(call.kwargs)
