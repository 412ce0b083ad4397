"""Models that fx alone can't trace: sizes, constants, containers, in-place writes, and what has to stay Python."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore.fx.graph_module import QGraphModule
from tests.models import Encoder, Scaled, Scaled2, close, prepared_for


def test_rules_of_a_mapping_speak_of_parts_by_their_whole_names():
    mapping = qcore.get_default_qconfig_mapping("reference").set_module_name("blocks.1", None)
    mapping.set_object_type(nn.GELU, None).set_module_name("blocks.0.mlp.2", None)
    prepared = qcore.prepare_fx(Encoder().eval(), mapping, (torch.randint(0, 10, (2, 5)),), backend="reference")
    plan = qcore.explain(prepared)
    assert {d.path for d in plan.quantized if d.operators[0] == "linear"} == {
        "blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.0", "head",
    }  # fmt: skip
    assert {d.rule for d in plan.floating if d.path.startswith("blocks.1")} == {"module_name 'blocks.1'"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids) * 2)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "x86_onednn"])
def test_a_weight_that_an_embedding_shares_stays_float_there(backend):
    if backend not in [b.name for b in qcore.installed_backends()]:
        pytest.skip(f"{backend} isn't installed")
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 10, (2, 5))
    prepared = prepared_for(model, (ids,), backend=backend)
    prepared(ids)
    converted = qcore.convert_fx(prepared)
    assert [d.operators for d in qcore.explain(converted).quantized] == [("linear",)]
    close(copy.deepcopy(converted)(ids), model(ids))


def test_a_model_that_is_one_known_module():
    prepared = prepared_for(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert [d.operators for d in qcore.explain(prepared).quantized] == [("linear",)]


def test_a_ready_graph_module_is_accepted_with_what_its_tracer_kept_whole():
    class KeepsScaled(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, Scaled) or super().is_leaf_module(m, module_qualified_name)

    model = nn.Sequential(nn.Linear(4, 4), Scaled2()).eval()
    graph_module = torch.fx.GraphModule(model, KeepsScaled().trace(model))
    plan = qcore.explain(prepared_for(graph_module, (torch.randn(2, 4),)))
    assert {d.path for d in plan.quantized} == {"0"}
    assert [d.operators for d in plan.floating][:1] == [("Scaled2",)]


@torch.no_grad()
def test_random_numbers_of_the_process_stay_where_they_were():
    model = Noisy()
    before = torch.random.get_rng_state()
    prepared_for(model, (torch.zeros(2, 4),))
    assert torch.equal(torch.random.get_rng_state(), before)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        torch.nn.init.ones_(self.linear.weight)

    def forward(self, x):
        return self.linear(x + torch.rand(x.shape[0], 4))


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["causal", "hinted", "boolean", "padding", "both", "unhinted, no causal one"])
def test_an_encoder_with_masks_is_a_graph(masks, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options = {
        "causal": {"mask": causal},
        "hinted": {"mask": causal, "is_causal": True},
        "boolean": {"mask": causal != 0},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal != 0, "src_key_padding_mask": padding},
        "unhinted, no causal one": {"mask": causal.T.contiguous()},
    }[masks]
    x = x if batch_first else x.transpose(0, 1).contiguous()
    prepared = prepared_for(model, ((x,), options))
    assert isinstance(prepared, QGraphModule)
    assert sum(bool(d.weights) for d in qcore.explain(prepared).quantized) == 8
    assert torch.allclose(prepared(x, **options), model(x, **options), atol=1e-5)
    close(qcore.convert_fx(prepared)(x, **options), model(x, **options))


class DecidingLayer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) if x.sum() > -1e9 else x


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_layer_that_stays_python_does_not_pass_its_parts_by(padded):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(DecidingLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options = {"src_key_padding_mask": padding} if padded else {}
    prepared = prepared_for(model, ((x,), options))
    assert qcore.explain(prepared).parts[:3] == ("layers.0.self_attn", "layers.0.linear1", "layers.0.linear2")
    assert torch.allclose(prepared(x, **options), model(x, **options), atol=1e-5)
    converted = pickle.loads(pickle.dumps(qcore.convert_fx(prepared)))  # All observers have seen data.
    close(converted(x, **options), model(x, **options))
    assert not torch.equal(converted(x, **options), prepared(x, **options))
    nested = nn.TransformerEncoder(DecidingLayer(16, 4, 32, batch_first=True), 1)
    assert nested.use_nested_tensor and not prepared_for(nested, ((x,), options)).use_nested_tensor


class AsksWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        weight = self.linear.weight
        rows, columns = weight.shape
        sizes = rows + weight.size(1) + weight.numel() + weight.dim() + weight.ndim + len(weight) + weight.shape[-1]
        return (self.linear(x) + sizes - columns).to(weight.dtype)


@torch.no_grad()
def test_a_weight_that_is_asked_for_its_shape_is_not_read_for_that(installed_backend):
    torch.manual_seed(0)
    model, x = AsksWeights(), torch.randn(2, 4)
    prepared = prepared_for(model, (x,), backend=installed_backend)
    assert torch.equal(prepared(x), model(x))
    (weight,) = [node for node in prepared.graph.nodes if node.target == "linear.weight"]
    assert [user.target for user in weight.users] == [torch._C._nn.linear]
    close(qcore.convert_fx(prepared)(x), model(x))
