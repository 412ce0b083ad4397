"""Tracing: one normal form for every way of writing an operator, and a model of its own that computes the same."""

import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcore.errors import TraceError
from qcore.fx.fuse import BATCH_NORM_FUSIONS, fuse
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


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return F.linear(weight=self.weight, input=x)


def test_a_functional_layer_and_a_module_look_alike():
    for model in (Weights(), nn.Sequential(nn.Linear(4, 5, bias=False))):
        traced = trace(model.eval())
        (node,) = (n for n in traced.graph.nodes if n.op == "call_function")
        assert operator_of(node).name == "linear"
        assert [a.op if a is not None else None for a in node.args] == ["placeholder", "get_attr", None]


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


class Inplace(nn.Module):
    def forward(self, x):
        y = x * 2
        identity = y
        y += 1
        F.relu(y, inplace=True)
        total = identity + y
        y *= 3
        y -= 1
        return total, y.add_(3), identity


class Statements(nn.Module):
    def forward(self, x):
        y = x * 2
        y.sub_(1)
        y.masked_fill_(y < 0, 5.0)
        return y


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(4))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.scale + self.table


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.linear(x))


class OwnConv(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1))) * 2


MODELS = {
    "in-place": (Inplace(), (3, 4)),
    "in-place statements": (Statements(), (3, 4)),
    "buffers": (Buffers(), (3, 4)),
    "shared": (Shared(), (3, 4)),
    "padding by reflection": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 5)),
    "a subclass of a convolution": (nn.Sequential(OwnConv(4, 2, 3)), (1, 4, 6)),
    "a single layer": (nn.Conv1d(4, 2, 3), (1, 4, 6)),
    "dropout and identity": (nn.Sequential(nn.Dropout(), nn.Identity(), nn.Linear(4, 2)), (3, 4)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, output_padding=1)), (1, 2, 4, 4)),
    "pools": (nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1)), (1, 2, 9, 9)),
    "recurrent leaf": (nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 2)), (3, 4)),
    "sizes": (as_module(lambda x: x.view(x.size(0), -1).permute(1, 0).reshape(x.shape[0], -1)), (3, 2, 2)),
    "arithmetic on sizes": (as_module(lambda x: x.view(x.size(0) * 2 + 0, x.size(1) // 2)), (3, 4)),
    "view as": (as_module(lambda x: x.reshape(x.shape).view(torch.int32)), (3, 4)),
    "split": (as_module(lambda x: torch.cat(x.chunk(2, 1)[::-1], dim=1)), (3, 4)),
    "approximate GELU": (nn.Sequential(nn.GELU("tanh")), (3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_traced_model_computes_exactly_the_same(name):
    model, shape = MODELS[name]
    model.eval()
    x = torch.randn(shape)
    expected, found = model(x.clone()), trace(model)(x.clone())
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        assert torch.equal(a, b)


def _tensors(value):
    return [t for item in value for t in _tensors(item)] if isinstance(value, tuple) else [value]


def test_a_module_called_twice_is_two_nodes_with_one_weight():
    graph = trace(Shared().eval()).graph
    first, second = (n for n in graph.nodes if operator_of(n))
    assert first is not second and first.args[1] is second.args[1]


def test_the_result_shares_nothing_with_the_model_and_leaves_it_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    traced = fuse(trace(model), BATCH_NORM_FUSIONS)
    mine = {value.data_ptr() for value in model.state_dict().values()}
    assert not mine & {value.data_ptr() for value in traced.state_dict().values()}
    for value in traced.state_dict().values():
        value.zero_()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_names_of_weights_stay():
    traced = trace(nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))).eval())
    assert {"0.0.weight", "0.0.bias", "0.1.running_mean"} <= set(traced.state_dict())


def test_leaves_are_kept_whole():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Tanh()).eval()
    for arguments in ({"leaf_names": ["0"]}, {"leaf_classes": [nn.Tanh]}):
        traced = trace(model, **arguments)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == [
            "0" if "leaf_names" in arguments else "1"
        ]


def test_pickling_keeps_the_names_of_nodes():
    traced = trace(nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Flatten()).eval())
    again = pickle.loads(pickle.dumps(traced))
    assert [n.name for n in again.graph.nodes] == [n.name for n in traced.graph.nodes]
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(again(x), traced(x))


def test_control_flow_on_data_names_the_innermost_module():
    class Deep(nn.Module):
        def forward(self, x):
            return x if x.max() > 0 else -x

    with pytest.raises(TraceError, match=r"'1\.0' \(Deep\).*test_tracer\.py:\d+") as caught:
        trace(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Deep())).eval())
    assert caught.value.module_path == "1.0"


FUSABLE = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6, affine=False)], (2, 4, 5, 5, 5)),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (2, 4)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", FUSABLE)
def test_a_batch_norm_is_folded(name):
    build, shape = FUSABLE[name]
    model = nn.Sequential(*build())
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    model.eval()
    fused = fuse(trace(model), BATCH_NORM_FUSIONS)
    fused.recompile()
    assert "batch_norm" not in [operator_of(n).name for n in fused.graph.nodes if operator_of(n)]
    x = torch.randn(shape)
    assert torch.allclose(fused(x), model(x), atol=1e-5)
    assert not [key for key in fused.state_dict() if "running" in key]


def test_a_convolution_with_two_batch_norms_gets_two_weights():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.a, self.b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
            self.b.running_var.fill_(4)

        def forward(self, x):
            return self.a(self.conv(x)) + self.b(self.conv(x))

    model, x = Two().eval(), torch.randn(1, 2, 3, 3)
    fused = fuse(trace(model), BATCH_NORM_FUSIONS)
    fused.recompile()
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_a_convolution_that_others_read_keeps_its_batch_norm():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    fused = fuse(trace(Read().eval()), BATCH_NORM_FUSIONS)
    assert "batch_norm" in [operator_of(n).name for n in fused.graph.nodes if operator_of(n)]
