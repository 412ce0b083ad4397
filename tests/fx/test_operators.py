"""The table of operators: one normal form for every way of writing one."""

import operator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcore.fx import operators as op
from qcore.fx.inplace import given, write_back
from qcore.fx.operators import FORMS, RNN_CELLS, operator_of
from qcore.fx.tracer import trace


def calls(function_or_module):
    """The operators that tracing gives, with their arguments that aren't values of the graph."""
    graph = trace(as_module(function_or_module)).graph
    return [
        (operator_of(n).name, *(a for a in n.args if not isinstance(a, torch.fx.Node)))
        for n in graph.nodes
        if n.op == "call_function" and n.target not in (given, write_back)  # An in-place form writes its input.
    ]


def as_module(function_or_module):
    if isinstance(function_or_module, nn.Module):
        return function_or_module.eval()

    class Model(nn.Module):
        def forward(self, x):
            return function_or_module(x)

    return Model().eval()


@pytest.mark.parametrize(
    "form",
    [
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        nn.Hardtanh(0.0, 6.0),
        F.relu6,
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda x: F.hardtanh(input=x, max_val=6.0, min_val=0.0, inplace=True),
        lambda x: x.clamp(0.0, 6.0),
        lambda x: torch.clamp(x, max=6.0, min=0.0),
        lambda x: x.clip(0.0, 6.0),
    ],
)
def test_every_form_of_a_clamp_is_the_same_node(form):
    assert calls(form) == [("clamp", 0.0, 6.0)]


@pytest.mark.parametrize("form", [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_()])
def test_every_form_of_a_relu_is_a_clamp_at_zero(form):
    assert calls(form) == [("clamp", 0.0, None)]


@pytest.mark.parametrize("form", [lambda x: x + x, lambda x: torch.add(x, other=x), lambda x: x.add(x), operator.neg])
def test_forms_of_an_addition(form):
    expected = [] if form is operator.neg else [("add",)]
    graph = trace(as_module(form)).graph
    assert [(operator_of(n).name,) for n in graph.nodes if operator_of(n)] == expected


def test_a_scaled_addition_is_no_plain_one():
    graph = trace(as_module(lambda x: torch.add(x, x, alpha=2))).graph
    assert [operator_of(n) for n in graph.nodes if n.op == "call_function"] == [None]


class Cell(nn.Module):
    def __init__(self, function, gates):
        super().__init__()
        self.function = function
        self.w_ih, self.w_hh = (nn.Parameter(torch.randn(gates * 4, 4)) for _ in range(2))
        self.b_hh = nn.Parameter(torch.randn(gates * 4))

    def forward(self, x):
        return self.function(x, x, self.w_ih, self.w_hh, b_ih=torch.zeros_like(self.b_hh), b_hh=self.b_hh)


@pytest.mark.parametrize("function, gates", [(torch.rnn_tanh_cell, 1), (torch.rnn_relu_cell, 1), (torch.gru_cell, 3)])
def test_a_recurrent_cell_is_one_operator_with_two_weights(function, gates):
    traced = trace(Cell(function, gates).eval())
    (node,) = (n for n in traced.graph.nodes if operator_of(n) in RNN_CELLS)
    op = operator_of(node)
    assert node.target is function and not node.kwargs
    assert [node.args[position].target for position in op.weights] == ["w_ih", "w_hh"]
    assert node.args[op.biases[1]].target == "b_hh"
    assert (op.weight, op.bias) == (op.weights[0], op.biases[0])


def test_every_weight_has_a_bias():
    operators = {form.operator for form in FORMS.values()} - {None}
    assert all(len(op.weights) == len(op.biases) for op in operators)


@pytest.mark.parametrize("form", [lambda x: torch.cat(x.chunk(2, 1), 1), lambda x: torch.cat(x.chunk(2, 1), dim=1)])
def test_a_tuple_is_joined_as_its_members_are(form):
    assert calls(form) == [("chunk", 2, 1), ("cat", 1)]


OTHERS = {
    "clamp by tensors": lambda x: torch.clamp(x, x.new_zeros(4), x.new_ones(4)),
    "mean of everything": lambda x: torch.mean(x),
    "softmax in another dtype": lambda x: torch.softmax(x, 1, torch.float64),
    "method in another dtype": lambda x: x.softmax(1, torch.float64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_without_a_normal_form_is_taken_for_none(name):
    traced, x = trace(as_module(OTHERS[name])), torch.randn(3, 4)
    last = next(n for n in reversed(traced.graph.nodes) if n.op in ("call_function", "call_method"))
    assert operator_of(last) is None
    assert torch.equal(traced(x), OTHERS[name](x))


def nodes_of(function):
    return {node.name: node for node in trace(as_module(function)).graph.nodes}


def test_activations_are_what_is_read_as_such_in_order():
    nodes = nodes_of(lambda x: torch.cat([x.exp(), F.linear(x.sin(), x.cos(), x.tan()), x.exp()], 1))
    assert [n.name for n in op.activation_inputs(nodes["cat"])] == ["exp", "linear", "exp_1"]
    assert [n.name for n in op.activation_inputs(nodes["linear"])] == ["sin"]  # Neither weight nor bias.
    assert [n.name for n in op.activation_inputs(nodes["exp"])] == ["x"]
    assert op.has_weights(nodes["linear"]) and not op.has_weights(nodes["cat"]) and not op.has_weights(nodes["exp"])


def test_what_a_pattern_names_is_what_its_nodes_are():
    nodes = nodes_of(lambda x: x.relu() + torch.exp(x).cumsum(0))
    keys = [op.anchor_key(nodes[name], {}) for name in ("clamp", "exp", "cumsum", "add")]
    assert keys == [op.CLAMP, torch.exp, "cumsum", op.ADD]
    assert op.pattern_keys((nn.ReLU, torch.exp, "cumsum", torch.add)) == tuple(keys)
    assert op.pattern_keys(F.relu6) == op.pattern_keys("clamp_") == op.pattern_keys(op.CLAMP) == (op.CLAMP,)
    assert op.pattern_keys(nn.LSTM) == (nn.LSTM,)
    graph = torch.fx.Graph()
    leaf = graph.call_module("some.path", ())
    assert op.anchor_key(leaf, {"some.path": nn.LSTM}) is nn.LSTM


def test_a_node_with_keywords_is_none_of_the_table_s():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert operator_of(graph.call_function(torch.clamp, (x, 0.0, 1.0))) is op.CLAMP
    assert operator_of(graph.call_function(torch.clamp, (x,), {"min": x})) is None
    assert operator_of(graph.call_method("clamp", (x, 0.0, 1.0))) is None
    assert op.kept_apart(torch.clamp, (x, x, x)) == ((x, x), {"max": x})
    assert op.kept_apart(torch.exp, (x, x)) == ((x, x), {})


def test_a_name_means_one_operator_and_a_like_one_is_not_listed():
    for operator_ in (op.LINEAR, *op.MOVE_OPERATORS):
        assert op.operator_named(operator_.name) is operator_ and op.is_listed(replace(operator_))
        assert not op.is_listed(replace(operator_, weights=(7,)))
    assert not op.is_listed(replace(op.LINEAR, name="liner"))
    assert {o.kind for o in op.MOVE_OPERATORS} == {op.Kind.MOVE} and op.CLAMP not in op.MOVE_OPERATORS


def test_modules_hand_on_attributes_that_they_have():
    """A misspelt one would be ``None`` in silence."""
    makers = {
        kind: kind(1, 1, 1) if "Conv" in kind.__name__ else kind(2, (1, 2)) if kind is nn.Unflatten else None
        for kind in op.MODULES
    }
    for kind, form in op.MODULES.items():
        module = makers[kind]
        for arguments in ((), (1,), (1, 1)):
            if module is None:
                try:
                    module = kind(*arguments)
                except (TypeError, ValueError):
                    continue
        assert module is not None, kind
        for name in (*form.tensors, *form.attributes):
            assert hasattr(module, name) or (kind, name) == (nn.AvgPool1d, "divisor_override"), (kind, name)
