"""Rewrites are verified by a run: what a backend's rewrite changes is taken back, and said."""

import pytest
import torch
from torch import nn

import qcore
from qcore import errors
from qcore.fx.fuse import BATCH_NORM_FUSIONS, FusionPattern
from qcore.fx.operators import CLAMP, LINEAR
from qcore.fx.verify import distance


def doubles(module, chain):
    (linear,) = chain
    with module.graph.inserting_after(linear):
        doubled = module.graph.call_function(torch.mul, (linear, 2.0))
    linear.replace_all_uses_with(doubled)
    doubled.args = (linear, 2.0)
    return True


def drops_the_clamp(module, chain):
    chain[1].replace_all_uses_with(chain[0])
    module.graph.erase_node(chain[1])
    return True


def fails(module, chain):
    raise KeyError("weight")


def reads_what_is_not_there(module, chain):
    with module.graph.inserting_before(chain[0]):
        chain[0].args = (module.graph.call_method("nowhere", chain[0].args[:1]), *chain[0].args[1:])
    return True


def negates_twice(module, chain):
    """Right, if roundabout."""
    (linear,) = chain
    with module.graph.inserting_after(linear):
        once = module.graph.call_function(torch.neg, (linear,))
    with module.graph.inserting_after(once):
        twice = module.graph.call_function(torch.neg, (once,))
    linear.replace_all_uses_with(twice)
    once.args = (linear,)
    return True


@pytest.fixture
def prepare(monkeypatch):
    def run(model, x, *rewrites, patterns=((LINEAR,),)):
        own = [FusionPattern(pattern, rewrite) for pattern in patterns for rewrite in rewrites]
        monkeypatch.setattr(qcore.plugins.manager.Backend, "fusion_patterns", lambda self: (*BATCH_NORM_FUSIONS, *own))
        return qcore.prepare_fx(
            model.eval(), qcore.get_default_qconfig_mapping("reference"), x if isinstance(x, tuple) else (x,),
            backend="reference",
        )  # fmt: skip

    return run


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rewrite", "pattern", "reason"),
    [
        (doubles, (LINEAR,), "a result differs by"),
        (drops_the_clamp, (LINEAR, CLAMP), "a result differs by"),
        (reads_what_is_not_there, (LINEAR,), "with it the graph fails: AttributeError"),
    ],
)
def test_a_rewrite_that_changes_the_model_is_taken_back_and_named(prepare, rewrite, pattern, reason):
    torch.manual_seed(0)
    model, x = network(), torch.randn(3, 4)
    prepared = prepare(model, x, rewrite, patterns=[pattern])
    assert torch.allclose(prepared(x), model(x), atol=1e-5)
    (note,) = qcore.explain(prepared).notes
    assert f"{__name__}.{rewrite.__name__} was taken back: {reason}" in note
    assert not any("batch_norm" in str(node.target) for node in prepared.graph.nodes)  # What is right stays.
    assert qcore.explain(qcore.convert_fx(prepared)).notes == (note,)


def test_a_rewrite_that_fails_is_an_error_that_names_the_plugin(prepare):
    with pytest.raises(errors.PluginError, match=r"(?s)rewrite of the fusion pattern .* failed: KeyError"):
        prepare(network(), torch.randn(3, 4), fails, patterns=[(LINEAR,)])


@torch.no_grad()
def test_a_rewrite_that_computes_the_same_stays(prepare):
    model, x = network(), torch.randn(3, 4)
    prepared = prepare(model, x, negates_twice)
    assert [node.target for node in prepared.graph.nodes].count(torch.neg) == 2
    assert qcore.explain(prepared).notes == ()
    assert torch.allclose(prepared(x), model(x), atol=1e-5)


class Draws(nn.Module):
    """Random numbers, integers, booleans and no numbers at all among its results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x) + torch.rand(x.shape[0], 4)
        return y, y.argmax(-1), y > 0, y[:0], (y - y) / (y - y), x.dtype


@torch.no_grad()
def test_results_of_all_kinds_are_compared(prepare):
    prepared = prepare(Draws(), torch.randn(3, 4), negates_twice)
    assert qcore.explain(prepared).notes == ()
    assert [node.target for node in prepared.graph.nodes].count(torch.neg) == 2
    prepared = prepare(Draws(), torch.randn(3, 4), doubles)
    assert "doubles was taken back" in qcore.explain(prepared).notes[0]


def test_what_is_rounding_and_what_is_not():
    x = torch.tensor([1.0, 100.0, float("nan"), float("inf")])
    rounded = x + torch.tensor([9e-3, 0, 0, 0])
    assert distance(x, rounded) == ""
    assert "differs by 0.02" in distance(x, x + torch.tensor([2e-2, 0, 0, 0]))
    assert "infinite or no number" in distance(x, torch.tensor([1.0, 100.0, 3.0, float("inf")]))
    assert "was torch.float32[4]" in distance(x, x.double())
    assert "was torch.float32[4]" in distance(x, x[None])
    assert "built otherwise" in distance((x, x), [x, x])
    assert distance(torch.arange(9), torch.arange(9)) == ""
    assert "11% of a result's integers" in distance(torch.arange(9), torch.arange(9).clamp(1))
    assert distance(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.01], dtype=torch.bfloat16)) == ""
    assert distance((torch.zeros(0), None), (torch.zeros(0), None)) == ""
    assert distance(torch.zeros(2), torch.zeros(2)) == "" and distance(torch.zeros(2), torch.full((2,), 1e-9)) != ""
