"""Work on graphs that the passes share: it must leave a graph that fx, too, takes for sound."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from qcore.fx.inplace import check_apart, write_back
from qcore.fx.nodes import READ_BY_CODE, copied_graph, drop_unread, identifiers, new_node, set_arguments
from qcore.fx.signature import check_size


def chain():
    """``neg(x + y)``, with names that fx wouldn't give."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = graph.create_node("call_function", torch.add, (x, y), name="total_7")
    graph.output((graph.create_node("call_function", torch.neg, (total,), name="last"),))
    return graph


def test_a_copied_graph_has_nodes_of_its_own_with_the_same_names_and_meta():
    graph = chain()
    node = next(n for n in graph.nodes if n.name == "total_7")
    node.meta["example"] = "noted"
    copied = copied_graph(graph)
    copied.lint()
    assert [(n.name, n.op, n.target) for n in copied.nodes] == [(n.name, n.op, n.target) for n in graph.nodes]
    assert not set(copied.nodes) & set(graph.nodes)
    (twin,) = (n for n in copied.nodes if n.name == "total_7")
    assert twin.meta == {"example": "noted"}
    twin.meta["example"] = "changed"
    twin.args = twin.args[::-1]
    assert node.meta["example"] == "noted" and [a.name for a in node.args] == ["x", "y"]
    # A name that the copy has isn't given again.
    with copied.inserting_after(twin):
        assert new_node(copied, "call_function", torch.neg, (twin,), name="total_7").name != "total_7"


def test_arguments_that_are_set_are_known_to_their_sources():
    graph = chain()
    x, y, total, last, _ = graph.nodes
    with graph.inserting_after(total):
        node = new_node(graph, "call_function", torch.cat, ([x, total],))
    assert list(x.users) == [total, node] and list(total.users) == [last, node]
    set_arguments(node, ([y, y],), {"dim": 1})
    assert list(x.users) == [total] and list(y.users) == [total, node] and node.kwargs == {"dim": 1}
    graph.lint()


def test_no_node_hides_what_the_code_reads():
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = [new_node(graph, "call_function", torch.neg, (x,), name=name) for name in READ_BY_CODE]
    assert not READ_BY_CODE & {node.name for node in made}
    graph.output((*made, graph.get_attr("weight")))  # Read of "self", after a node that wanted to be called so.
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(2))
    *found, weight = fx.GraphModule(root, graph)(torch.ones(2))
    assert weight is root.weight and all(torch.equal(entry, -torch.ones(2)) for entry in found)


def test_what_nothing_reads_goes_and_what_lasts_stays():
    graph = fx.Graph()
    x, unread = graph.placeholder("x"), graph.placeholder("unread")
    size = graph.call_method("size", (x, 0))
    graph.call_function(check_size, (size, 2, "x.size(0)"))
    new = graph.call_function(torch.neg, (x,))
    graph.call_function(write_back, (x, new))
    graph.call_function(check_apart, ((x,), (x, unread)))
    dead = graph.call_function(torch.exp, (x,))
    graph.call_function(torch.log, (dead,))
    graph.output((x,))
    drop_unread(graph)
    assert [node.name for node in graph.nodes] == [
        "x", "unread", "size", "check_size", "neg", "write_back", "check_apart", "output",
    ]  # fmt: skip
    graph.lint()


NAMES = st.text("ab_1[]'. é", max_size=6) | st.sampled_from([*READ_BY_CODE, "states[0]", "states_0"])


@given(st.lists(NAMES, unique=True))
def test_identifiers_are_distinct_names_that_hide_nothing(names):
    found = identifiers(names)
    assert len(set(found)) == len(names) == len(found)
    assert all(name.isidentifier() for name in found) and not READ_BY_CODE & set(found)
    for name, made in zip(names, found, strict=True):
        assert made == name or not name.isidentifier() or name in READ_BY_CODE
