"""Runs and their comparison: a difference that isn't seen, or a write that isn't, is a part that is trusted wrongly."""

import enum
import operator
import re
from collections import OrderedDict

import pytest
import torch
from torch import fx, nn

from qcore.errors import ExampleInputsError, TraceError
from qcore.fx.inplace import write_back
from qcore.fx.shapes import (
    Example,
    difference,
    is_float_tensor,
    is_floating_tensor,
    propagate_examples,
    run_model,
)

X = torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]])


class Colour(enum.Enum):
    RED = 1


class Holder:
    """A result of a class that says of no other object that it is the same."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    "value",
    [
        X,
        (X, [X, {"a": X}]),
        None,
        3,
        -0.5,
        "text",
        Colour.RED,
        Holder(X),
        Holder((1, X)),
        OrderedDict(a=X),
        torch.ones(0),
    ],
)
def test_a_result_is_the_same_as_its_like(value):
    def again(item):
        if isinstance(item, Holder):
            return Holder(again(item.value))
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, item)

    assert difference(value, again(value)) == ""


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (X, torch.nextafter(X, torch.tensor(9.0)), "other values"),
        (X, X.nan_to_num(), "other values"),
        (X, X.double(), r"it gives float64\[2, 2\] where the module gives float32\[2, 2\]"),
        (X, X[:, :, None], "where the module gives"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "other values"),
        ((X, X), [X, X], "built otherwise"),
        ({"a": X}, {"b": X}, "built otherwise"),
        (X, (X,), "built otherwise"),
        (1, True, "it gives True where the module gives 1"),
        (1, 1.0, "it gives 1.0 where the module gives 1"),
        (X, None, "built otherwise|gives None"),
        (Holder(1), Holder(2), "it gives "),
        (Holder(X), Holder(X + 1), "it gives "),
    ],
)
def test_a_result_that_differs_in_anything_is_told(expected, found, message):
    assert re.search(message, difference(expected, found))


class Doubles(nn.Module):
    def forward(self, x, *, by):
        return x.mul_(by)


def test_the_model_runs_on_copies_without_gradients():
    x = torch.ones(2, requires_grad=True)
    result = run_model(Doubles(), (x,), {"by": 2.0})
    assert torch.equal(result, torch.tensor([2.0, 2.0])) and not result.requires_grad
    assert torch.equal(x, torch.ones(2))


def test_inputs_on_which_it_does_not_run_are_described():
    with pytest.raises(ExampleInputsError) as caught:
        run_model(Doubles(), (torch.ones(2, 3),), {"by": torch.ones(4)})
    assert "Doubles doesn't run on example_inputs=(float32[2, 3], by=float32[4])" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def graph_of(*calls, give=-1):
    """A graph of functions of ``x``, each of the value before it."""
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for function, *args in calls:
        values.append(graph.call_function(function, tuple(values[a] if isinstance(a, int) else a[0] for a in args)))
    graph.output(values[give])
    return fx.GraphModule(nn.Module(), graph)


def examples(module):
    return {node.name: node.meta.get("example") for node in module.graph.nodes if node.op != "output"}


def test_every_tensor_s_shape_and_dtype_is_noted_and_nothing_else_s():
    module = graph_of((torch.gt, 0, (0,)), (getattr, 1, ("shape",)), (torch.neg, 0))
    module.graph.find_nodes(op="call_function", target=getattr)[0].meta["example"] = "of another run"
    x = torch.zeros(2, 3)
    propagate_examples(module, (x,))
    assert examples(module) == {
        "x": Example((2, 3), torch.float32), "gt": Example((2, 3), torch.bool), "getattr_1": None,
        "neg": Example((2, 3), torch.float32),
    }  # fmt: skip
    propagate_examples(module, (torch.zeros(5, 3),), notes=False)
    assert examples(module)["neg"] == Example((2, 3), torch.float32)
    nodes = {node.name: node for node in module.graph.nodes}
    assert is_float_tensor(nodes["x"]) and is_floating_tensor(nodes["x"])
    assert not is_float_tensor(nodes["gt"]) and not is_floating_tensor(nodes["getattr_1"])
    nodes["x"].meta["example"] = Example((1,), torch.float16)
    assert not is_float_tensor(nodes["x"]) and is_floating_tensor(nodes["x"])


def test_a_write_of_which_the_graph_knows_nothing_is_an_error():
    for module in (graph_of((operator.iadd, 0, (1.0,))), graph_of((torch.sin, 0), (operator.iadd, 1, (1.0,)))):
        x = torch.zeros(2)
        with pytest.raises(TraceError, match="is written, in a way that qcore doesn't know"):
            propagate_examples(module, (x,))
        assert torch.equal(x, torch.zeros(2))


def test_a_write_through_a_view_or_of_what_is_given_is_seen_too():
    through_view = graph_of((torch.sin, 0), (torch.t, 1), (operator.iadd, 2, (1.0,)), give=1)
    with pytest.raises(TraceError, match="what (sin|t) gives is written"):
        propagate_examples(through_view, (torch.zeros(2, 2),))


def test_writing_an_input_back_at_the_end_and_into_a_copy_of_one_s_own_is_known():
    module = graph_of((torch.exp, 0), (write_back, 0, 1))
    x = torch.zeros(2)
    assert torch.equal(propagate_examples(module, (x,)), torch.ones(2))
    assert torch.equal(x, torch.zeros(2))  # A copy of it was written.


def test_containers_of_the_result_can_be_changed_as_a_forward_s_own():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output({"a": [x, (x,)]})
    result = propagate_examples(fx.GraphModule(nn.Module(), graph), (torch.zeros(1),))
    result["a"].append(1)
    assert type(result) is dict and type(result["a"]) is list and type(result["a"][1]) is tuple
