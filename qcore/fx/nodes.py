"""Work on fx graphs that the passes share, each cheaper than fx does it: nodes, copies of graphs, dead code.

``fx.Graph.create_node`` looks through all arguments of a call for symbolic numbers, which takes longer than all else
that it does; arguments that are set afterwards it doesn't look at. No graph of qcore holds symbolic numbers.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import fx

from qcore.fx.inplace import LASTING
from qcore.fx.signature import GLOBALS, check_size

#: Names that the code of a graph reads beside those of its nodes.
READ_BY_CODE = frozenset(("self", *GLOBALS))


def new_node(graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...] = (), name: str | None = None) -> fx.Node:
    """A node at the graph's insertion point.

    Args:
        graph: gets the node.
        op: as in ``fx.Graph.create_node``.
        target: likewise.
        args: likewise.
        name: wanted; by default that of the target.
    """
    node = unshadowed(graph.create_node(op, target, name=name))
    if args:
        set_arguments(node, args)
    return node


def unshadowed(node: fx.Node) -> fx.Node:
    """A new node without arguments, or one like it with a name that hides nothing which generated code reads."""
    if node.name not in READ_BY_CODE:
        return node
    graph = node.graph
    graph.erase_node(node)
    return graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)  # That name is taken now.


def set_arguments(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Give a node its arguments."""
    # Past Node.__setattr__, which files the node anew with its graph although only its arguments change.
    if args:
        object.__setattr__(node, "args", args)
    if kwargs:
        object.__setattr__(node, "kwargs", kwargs)


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of nodes of its own, with the names, meta and code generator of another."""
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    counterpart: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made = counterpart[node] = copied.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        args, kwargs = fx.map_arg((node.args, node.kwargs), counterpart.__getitem__)
        set_arguments(made, args, kwargs)
        made.meta = copy.copy(node.meta)
    copied.set_codegen(copy.deepcopy(graph._codegen))
    return copied


def is_impure(node: fx.Node) -> bool:
    """Whether a node stays although nothing reads it."""
    return node.op in ("placeholder", "output") or node.target is check_size or node.target in LASTING


def drop_unread(graph: fx.Graph) -> None:
    """Drop every node that nothing reads, and what only such nodes read."""
    for node in reversed(graph.nodes):
        if not node.users and not is_impure(node):
            graph.erase_node(node)


def identifiers(names: Sequence[str]) -> list[str]:
    """Names of parameters for the inputs of a graph, such as ``states_0`` for ``states[0]``."""
    found = dict.fromkeys(name for name in names if name.isidentifier() and name not in READ_BY_CODE)
    made = []
    for name in names:
        wanted = name
        if name not in found:
            wanted = "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_")
            wanted = wanted if wanted[:1].isalpha() else f"input_{wanted}"
            while wanted in found or wanted in READ_BY_CODE:
                wanted += "_"
            found[wanted] = None
        made.append(wanted)
    return made
