"""The reference model: what it computes, and that nothing else is touched by making it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from tests.converting import MAPPING, Functional, Nested, convert, prepare


def prepare_only(model, x):
    return qcore.prepare_fx(model.eval(), MAPPING, (x,), backend="reference")


def fake_quantize(x, low, high):
    scale = (max(high, 0) - min(low, 0)) / 255
    zero_point = torch.round(torch.tensor(-min(low, 0) / scale))
    return (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale


def test_a_linear_layer_is_what_one_would_write_by_hand():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(16, 6)
    reference = convert(nn.Sequential(layer), x)
    with torch.no_grad():
        scale = layer.weight.abs().amax(1, keepdim=True) / 127.5
        weight = torch.clamp(torch.round(layer.weight / scale), -128, 127) * scale
        y = F.linear(fake_quantize(x, x.min().item(), x.max().item()), weight, layer.bias)
        float_y = layer(x)
        expected = fake_quantize(y, float_y.min().item(), float_y.max().item())
        step = (float_y.max() - float_y.min()) / 255
        assert ((reference(x) - expected).abs() < 1e-5).float().mean() > 0.95  # A tie may fall the other way.
        assert ((reference(x) - expected).abs() < 1.01 * step).all()


def test_a_module_called_twice_keeps_both_outputs_accurate():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x), self.linear(100 * x)

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(32, 8)
    for expected, found in zip(model(x), convert(model, x)(x), strict=True):
        assert (expected - found).norm() < 0.02 * expected.norm()


def test_a_functional_weight_that_is_read_as_float_too():
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(16, 4)
    found = convert(model, x)
    assert (found(x) - model(x)).norm() < 0.02 * model(x).norm()
    assert {value.dtype for value in found.state_dict().values()} >= {torch.float32, torch.int8}


class Reading(nn.Module):
    """A linear layer, and something else that asks for its weight."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.layer, x)


READING = {
    "shape": lambda layer, x: layer(x).reshape(-1, layer.weight.shape[0]),
    "size": lambda layer, x: layer(x) * layer.weight.size(0),
    "dtype": lambda layer, x: layer(x.to(layer.weight.dtype)),
    "device": lambda layer, x: layer(x.to(layer.weight.device)),
    "new_zeros": lambda layer, x: layer(x) + layer.weight.new_zeros(8),
    "new_zeros of another shape": lambda layer, x: layer(x) + layer.weight.new_zeros(x.shape),
    "data": lambda layer, x: layer(x) + layer.weight.data.sum(),
    "detach": lambda layer, x: layer(x) + layer.weight.detach().mean(),
    "norm": lambda layer, x: layer(x) / layer.weight.norm(),
    "returned": lambda layer, x: torch.cat([layer(x), layer.weight]),
    "bias": lambda layer, x: layer(x) + layer.bias + layer.bias.new_ones(8),
    "an embedding": lambda layer, x: layer(x) + F.embedding(torch.arange(5), layer.weight),
    "another product": lambda layer, x: layer(x) + F.linear(x, layer.weight.t()),
    "as an activation": lambda layer, x: layer(x) + F.linear(layer.weight, layer.weight).sum(0),
}


@torch.no_grad()
@pytest.mark.parametrize("read", READING)
def test_whoever_reads_a_float_weight_gets_it(read, installed_backend):
    model, x = Reading(READING[read]).eval(), torch.randn(5, 8)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(installed_backend), (x,))
    qcore.calibrate(prepared, [x])
    for made in (qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)):
        for again in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            for _ in range(4):
                found = again(x)
                assert (found - model(x)).norm() < 0.03 * model(x).norm() and found.dtype == torch.float32
        assert any(value.dtype == torch.int8 for value in made.state_dict().values())


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_called_twice_of_which_one_call_stays_float(number, installed_backend):
    model, x = Reading(lambda layer, x: layer(x) + layer(x[:1])).eval(), torch.randn(5, 8)
    mapping = qcore.get_default_qconfig_mapping(installed_backend)
    mapping.set_module_name_object_type_order("", nn.Linear, number, None)
    prepared = qcore.prepare_fx(model, mapping, (x,))
    qcore.calibrate(prepared, [x])
    converted = qcore.convert_fx(prepared)
    assert len(qcore.explain(converted).quantized) == 1
    for _ in range(4):
        assert (converted(x) - model(x)).norm() < 0.03 * model(x).norm()


class Tied(nn.Module):
    """A language model's two ends, of one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.linear(self.embedding(tokens)))


@torch.no_grad()
def test_a_weight_that_is_an_embedding_too_is_stored_as_float_and_as_integers(installed_backend):
    model, tokens = Tied().eval(), torch.randint(0, 20, (3, 4))
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(installed_backend), (tokens,))
    qcore.calibrate(prepared, [tokens])
    for made in (qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)):
        for _ in range(4):
            assert (made(tokens) - model(tokens)).norm() < 0.03 * model(tokens).norm()
        assert torch.equal(made.state_dict()["embedding.weight"], model.embedding.weight)
        of_head = [value for value in made.state_dict().values() if value.shape == (20, 8)]
        assert sorted(str(value.dtype) for value in of_head) == ["torch.float32", "torch.int8"]


def test_a_parameter_that_is_called_like_the_qparams_of_a_weight_is_left_alone():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.weight_scale = nn.Parameter(torch.full((4,), 5.0))

        def forward(self, x):
            return F.linear(x, self.weight) * self.weight_scale

    torch.manual_seed(0)
    model, x = Clash().eval(), torch.randn(16, 4)
    assert (convert(model, x)(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_a_state_dict_carries_everything_to_a_twin():
    x = torch.randn(16, 4)
    first, second = (convert(Nested(), x * size) for size in (1.0, 3.0))
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    for value in first.state_dict().values():
        assert value.dtype in (torch.int8, torch.uint8, torch.int64, torch.float32) and not value.is_quantized


def test_converting_leaves_the_prepared_model_and_the_float_model_as_they_were():
    x = torch.randn(16, 4)
    model = Nested().eval()
    float_state = copy.deepcopy(model.state_dict())
    prepared = prepare(model, x)
    code, state = prepared.code, copy.deepcopy(prepared.state_dict())
    first, second = qcore.convert_fx(prepared), qcore.convert_fx(prepared)
    assert torch.equal(first(x), second(x))
    assert prepared.code == code
    assert all(torch.equal(value, prepared.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in float_state.items())
    for value in first.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, prepared.state_dict()[name]) for name, value in state.items())


def test_the_prepared_model_computes_what_the_float_model_does():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(prepare(model, x)(x), model(x))


@pytest.mark.parametrize("make", [prepare_only, convert, lambda model, x: qcore.convert_fx(prepare(model, x))])
def test_whoever_looks_at_a_model_before_its_first_call_finds_its_code(make):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4)
    expected = make(model, x)(x)
    assert "activation_post_process" in make(model, x).code
    assert "activation_post_process" in str(make(model, x))
    assert torch.equal(type(made := make(model, x)).forward(made, x), expected)
    assert torch.equal(copy.deepcopy(make(model, x))(x), expected)


def test_the_reference_model_exports():
    x = torch.randn(2, 3, 6, 6)
    reference = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), x)
    program = torch.export.export(reference, (x,))
    assert torch.equal(program.module()(x), reference(x))
    assert "qcore.quantize_per_tensor" in str(program.graph)


def test_a_branch_that_nothing_watches_may_run_on_any_batch():
    x = torch.randn(4, 4)
    assert convert(Nested(), x)(torch.randn(9, 4)).shape == (9, 4)
    assert convert(Nested(), x)(torch.randn(0, 4)).shape == (0, 4)
