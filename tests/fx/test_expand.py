"""Linear layers that are hidden in other operators, and tensors computed from parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.fx.graph_module import QGraphModule

LAYOUTS = {"batch first": (True, (3, 5, 16)), "sequence first": (False, (5, 3, 16)), "unbatched": (True, (5, 16))}


def prepared_for(model, example_inputs, backend="reference"):
    return qcore.prepare_fx(model.eval(), qcore.get_default_qconfig_mapping(backend), example_inputs)


class Attends(nn.Module):
    def __init__(self, *, cross=False, weights=False, average=True, mask=None, padding=None, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, **options)
        self.cross, self.weights, self.average, self.mask, self.padding = cross, weights, average, mask, padding

    def forward(self, x):
        other = x * 0.5 if self.cross else x
        y, weights = self.inner(
            x, other, other, attn_mask=self.mask, key_padding_mask=self.padding, need_weights=self.weights,
            average_attn_weights=self.average,
        )  # fmt: skip
        return (y, weights) if self.weights else y


def agree(model, x):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepared_for(model, (x,))
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    mine = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not mine & {tensor.data_ptr() for tensor in (*prepared.parameters(), *prepared.buffers())}
    assert isinstance(prepared, QGraphModule)
    with torch.no_grad():
        expected, found = model(x), prepared(x)
    for want, have in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, found)), strict=True):
        assert torch.allclose(want, have, atol=1e-5), (want - have).abs().max()
    return prepared


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_shows_its_linear_layers(layout, cross, weights):
    batch_first, shape = LAYOUTS[layout]
    x = torch.randn(shape)
    prepared = agree(Attends(cross=cross, weights=weights, batch_first=batch_first), x)
    linears = [d for d in qcore.explain(prepared).quantized if d.operators == ("linear",)]
    assert sum(d.weights for d in linears) == 4 * 16 * 16
    assert {d.path for d in linears} == {"inner"}


MASKS = {
    "additive": {"mask": torch.randn(5, 5)},
    "boolean": {"mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)},
    "per head": {"mask": torch.randn(12, 5, 5)},
    "padding": {"padding": torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])},
    "both": {
        "mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1),
        "padding": torch.tensor([[False] * 4 + [True]] * 3),
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("weights", [False, True])
def test_masks_of_multihead_attention(masks, weights):
    x = torch.randn(3, 5, 16)
    agree(Attends(batch_first=True, weights=weights, average=False, **masks), x)


def test_projections_of_other_widths_and_without_biases():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4, kdim=6, vdim=7, bias=False, batch_first=True)
            self.key, self.value = nn.Linear(16, 6), nn.Linear(16, 7)

        def forward(self, x):
            return self.inner(x, self.key(x), self.value(x), need_weights=False)[0]

    prepared = agree(Wide(), torch.randn(3, 5, 16))
    assert sum(d.weights for d in qcore.explain(prepared).quantized) == 16 * (16 + 6 + 7 + 16 + 6 + 7)


def test_attention_with_extra_keys_stays_whole():
    mapping = qcore.get_default_qconfig_mapping("reference")
    model = Attends(batch_first=True, add_bias_kv=True).eval()
    prepared = qcore.prepare_fx(model, mapping, (torch.randn(3, 5, 16),), on_unsupported="ignore")
    assert [module for module in prepared.modules() if type(module) is nn.MultiheadAttention]


@torch.no_grad()
def test_torch_s_own_transformer_layers(installed_backend):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 16)
    prepared = prepared_for(model, (x,), installed_backend)
    for batch in (3, 7):
        prepared(torch.randn(batch, 6, 16))
    converted = qcore.convert_fx(prepared)
    plan = qcore.explain(converted)
    assert sum(d.weights for d in plan.quantized) == 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert plan.weight_share == 1.0
    expected = model(x)
    assert (converted(x) - expected).norm() < 0.1 * expected.norm()


def test_attention_in_a_forward_that_stays_python():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x)[0] if x.sum() > -1e9 else x

    x, model = torch.randn(2, 5, 16), Decides()
    prepared = prepared_for(model, (x,))
    plan = qcore.explain(prepared)
    assert plan.parts == ("inner",) and plan.weight_share == 1.0
    assert {d.path for d in plan.quantized} == {"inner"}
    with torch.no_grad():
        assert torch.allclose(prepared(x), model(x), atol=1e-5)


class Projects(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        first = x @ self.matrix
        return first + torch.addmm(self.bias, x.view(-1, x.size(-1)), self.matrix).view(x.size(0), x.size(1), 6)


@torch.no_grad()
def test_products_with_a_matrix_of_parameters_are_linear_layers():
    torch.manual_seed(0)
    model, x = Projects(), torch.randn(2, 3, 4)
    prepared = agree(model, x)
    assert [d.operators for d in qcore.explain(prepared).quantized if d.weights] == [("linear",), ("linear",)]
    prepared(torch.randn(5, 3, 4))
    expected = model(x)
    assert (qcore.convert_fx(prepared)(x) - expected).norm() < 0.05 * expected.norm()
    assert model.matrix.shape == (4, 6)


def test_a_weight_that_is_computed_from_parameters_is_computed_once():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))

        def forward(self, x):
            return self.conv(x) + F.conv1d(x, torch.tanh(self.conv.weight), self.conv.bias)

    prepared = agree(Normed(), torch.randn(2, 4, 9))
    plan = qcore.explain(prepared)
    assert [d.operators for d in plan.quantized if d.weights] == [("conv1d",), ("conv1d",)]
    names = [name for name, _ in prepared.named_parameters()]
    assert len(names) == 3  # Two weights and a bias: what they were computed from is gone.


@pytest.mark.parametrize("width", [4, 400])
def test_what_would_take_more_memory_is_not_computed_once(width):
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.linear = nn.Parameter(torch.randn(1, width)), nn.Linear(width, 2)

        def forward(self, x):
            return self.linear(x + self.row.expand(50, width))

    prepared = agree(Grows(), torch.randn(50, width))
    assert sum(p.numel() for p in prepared.parameters()) == width + 2 * width + 2
