"""The verbs."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcore
from tests.converting import MAPPING, Nested, prepare


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_prepared_and_converted_models_copy_and_pickle(copied):
    x = torch.randn(16, 4)
    prepared = prepare(Nested(), x)
    again = copied(prepared)
    assert str(qcore.explain(again)) == str(qcore.explain(prepared))
    assert torch.equal(again(x), prepared(x))
    reference = qcore.convert_fx(prepared)
    assert torch.equal(qcore.convert_fx(again)(x), reference(x))
    assert torch.equal(copied(reference)(x), reference(x))


def test_preserved_attributes_stay():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.classes = ["cat", "dog"]
    custom = qcore.PrepareCustomConfig().set_preserved_attributes(["classes"])
    prepared = qcore.prepare_fx(model, MAPPING, (torch.randn(2, 4),), custom, backend="reference")
    prepared(torch.randn(2, 4))
    for made in (prepared, qcore.convert_fx(prepared), pickle.loads(pickle.dumps(prepared))):
        assert made.classes == ["cat", "dog"]
    assert prepared.classes is not model.classes


def test_fuse_fx_folds_and_nothing_more():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(1, 3, 5, 5)
    fused = qcore.fuse_fx(model)
    assert torch.allclose(fused(x), model(x), atol=1e-6)
    assert [n.target for n in fused.graph.nodes if n.op == "call_function"] == [torch.conv2d, torch.clamp]
