"""Modules with hooks: what runs at each call goes on to do so, and a weight that a hook computes is a weight."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import qcore
from qcore import MinMaxObserver, QConfig, QConfigMapping

INT8 = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric))
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
CALLED = []


def note(*_arguments):
    CALLED.append("called")


def doubled(module, args, output):
    note()
    return output * 2


HOOKS = {
    "forward": lambda m: m.register_forward_hook(note),
    "changing": lambda m: m.register_forward_hook(doubled),
    "before": lambda m: m.register_forward_pre_hook(note),
    "keywords": lambda m: m.register_forward_hook(lambda *_: note(), with_kwargs=True),
}


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()),
    ).eval()  # fmt: skip


def prepare(model, **arguments):
    mapping = QConfigMapping().set_global(INT8)
    return qcore.prepare_fx(model, mapping, (X,), backend="reference", **arguments)


def calls(model):
    CALLED.clear()
    with torch.no_grad():
        result = model(X)
    return len(CALLED), result


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("path", ["0", "1", "2", "3", "3.0", "3.1", "3.2", ""])
def test_a_hook_runs_at_every_call_and_the_plan_says_so(path, hook):
    model = network()
    HOOKS[hook](model.get_submodule(path))
    count, expected = calls(model)
    assert count == 1
    prepared = prepare(model)
    count, result = calls(prepared)
    assert count == 1 and torch.allclose(result, expected, atol=1e-5)
    for converted in (qcore.convert_fx(prepared), qcore.convert_to_reference_fx(prepared)):
        for _ in range(4):
            count, result = calls(converted)
            assert count == 1 and (result - expected).norm() < 0.05 * expected.norm()
        text = str(qcore.explain(converted))
        assert f"forward {'pre-' if hook == 'before' else ''}hook" in text
        assert qcore.explain(converted).quantized


def test_the_decision_for_a_hooked_layer():
    model = network()
    model[2].register_forward_hook(note)
    (decision,) = (d for d in qcore.explain(prepare(model)).decisions if d.path == "2")
    assert (decision.operators, decision.quantized) == (("Linear",), False)
    assert (decision.reason, decision.weights) == ("it has a forward hook, so it is called as it is", 256)
    mapping = QConfigMapping().set_global(INT8).set_object_type(nn.Linear, INT8)
    with pytest.raises(qcore.errors.UnsupportedQConfigError, match="Linear at 2 .*it has a forward hook"):
        qcore.prepare_fx(model, mapping, (X,), backend="reference", on_unsupported="error")


def test_attention_with_a_hook_is_called_whole():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    attention.register_forward_hook(note)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.linear = attention, nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(self.attention(x, x, x, need_weights=False)[0])

    x = torch.randn(2, 3, 8)
    prepared = qcore.prepare_fx(Holder().eval(), QConfigMapping().set_global(INT8), (x,), backend="reference")
    CALLED.clear()
    prepared(x)
    assert len(CALLED) == 1
    assert [d.path for d in qcore.explain(prepared).quantized] == ["linear"]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Own(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, tensor, default_mask):
        return (tensor > 0).to(tensor.dtype)


def pruned_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_structured(layer, "weight", 1, dim=0)


WEIGHTS = {
    "l1": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "L1Unstructured"),
    "twice": (pruned_twice, "PruningContainer"),
    "bias": (lambda m: prune.l1_unstructured(m, "bias", 2), "L1Unstructured"),
    "own": (lambda m: Own.apply(m, "weight"), "Own"),
    "weight_norm": (weight_norm, "WeightNorm"),
    "spectral_norm": (spectral_norm, "SpectralNorm"),
    "parametrized weight_norm": (parametrizations.weight_norm, "WeightNorm"),
    "parametrization": (lambda m: parametrize.register_parametrization(m, "weight", Halved()), "Halved"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("python", [False, True], ids=["graph", "Python"])
@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("path", ["0", "2"])
def test_a_weight_that_is_computed_is_quantized_and_the_plan_says_so(path, how, python):
    model = network()
    apply, maker = WEIGHTS[how]
    apply(model.get_submodule(path))
    model.eval()
    if python:
        model.register_forward_hook(note)
    with torch.no_grad():
        expected = model(X)
    prepared = prepare(model, on_unsupported="error")
    assert torch.allclose(prepared(X), expected, atol=1e-5)
    plan = qcore.explain(prepared)
    assert [d.path for d in plan.quantized if d.weights] == ["0", "2", "3.0"]
    (noted,) = plan.notes
    assert path in noted and f"what {maker} make of its weights is kept as it is now" in noted
    for converted in (qcore.convert_fx(prepared), pickle.loads(pickle.dumps(qcore.convert_fx(prepared)))):
        assert (converted(X) - expected).norm() < 0.05 * expected.norm()
        assert noted in qcore.explain(converted).notes


@pytest.mark.parametrize("verb", [prepare, qcore.fuse_fx])
def test_a_weight_whose_parts_were_changed_since_the_last_call(verb):
    model = network()
    prune.l1_unstructured(model[2], "weight", 0.5)
    with torch.no_grad():
        model(X)
        model[2].weight_orig.mul_(3)
        stale = model[2].weight.clone()
        result = verb(model)(X)
        assert verb is prepare or torch.equal(model[2].weight, stale)  # It isn't the user's model that is computed.
        assert torch.allclose(result, model(X), atol=1e-5)
