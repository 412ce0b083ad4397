"""Tracing: one normal form for every way of writing an operator, and a model of its own that computes the same."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.errors import TraceError
from qcore.fx.fuse import BATCH_NORM_FUSIONS, fuse
from qcore.fx.operators import operator_of
from qcore.fx.tracer import trace
from tests.models import Attention, Encoder, Scaled, Scaled2, prepared_for


def as_module(function_or_module):
    if isinstance(function_or_module, nn.Module):
        return function_or_module.eval()

    class Model(nn.Module):
        def forward(self, x):
            return function_or_module(x)

    return Model().eval()


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


class KeepsBlocks(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Scaled) or super().is_leaf_module(m, module_qualified_name)


def test_a_tracer_of_the_user_s_own():
    model = nn.Sequential(nn.Linear(4, 4), Scaled2())
    plan = qcore.explain(prepared_for(model, (torch.randn(2, 4),), tracer=KeepsBlocks()))
    assert {d.path for d in plan.quantized} == {"0"}
    with pytest.raises(errors.TraceError, match="KeepsBlocks can't trace Encoder: .* Leave tracer=... out"):
        prepared_for(Encoder(), (torch.randint(0, 10, (2, 5)),), tracer=KeepsBlocks())


def test_concrete_arguments_are_settled():
    x = torch.randn(2, 5, 16)
    prepared = prepared_for(Attention(), (x,), concrete_args={"flag": False})
    assert sum(d.weights for d in qcore.explain(prepared).quantized) == 16 * 48
    with pytest.raises(errors.GuardError, match="argument flag was False"):
        prepared(x)
    prepared(x, flag=False)
