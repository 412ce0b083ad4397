"""Parts: the largest modules that can be graphs, each proven by a replay, and the rest Python."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore import errors
from tests.models import Encoder, Scaled, TakesConstant, TwoForms, close, prepared_for


def test_parts_that_the_model_misses_are_found_in_few_runs():
    runs = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(64))

        def forward(self, x):
            runs.append(1)
            for number, block in enumerate(self.blocks):
                x = block(x)
                if number in (5, 40):
                    assert type(block) is Block
            return x if x.sum() > -1e9 else -x

    prepared = prepared_for(Reads(), (torch.randn(2, 4),))
    plan = qcore.explain(prepared)
    assert {module.path for module in plan.python} == {"", "blocks.5", "blocks.40"}
    assert len(plan.parts) == 64 and "blocks.5.linear" in plan.parts and "blocks.6" in plan.parts
    assert len(runs) < 40


def test_calls_that_differ_in_the_sign_of_zero_are_several_forms():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TakesConstant()

        def forward(self, x):
            if bool((x > 1000).any()):
                return x
            return self.inner(x, 0.0) + self.inner(x, -0.0) * 3

    model, x = Twice(), torch.randn(2, 4)
    prepared = prepared_for(model, (x,))
    assert qcore.explain(prepared).parts == ("inner.layer",)
    assert torch.equal(prepared(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "x86_onednn"])
def test_the_largest_parts_are_graphs_and_the_rest_stays_python(backend):
    if backend not in [b.name for b in qcore.installed_backends()]:
        pytest.skip(f"{backend} isn't installed")
    torch.manual_seed(0)
    model = Encoder()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 10, (2, 5))
    prepared = prepared_for(model, (ids,), backend=backend)
    assert type(prepared) is Encoder
    assert torch.allclose(prepared(ids)["logits"], model(ids)["logits"], atol=1e-5)
    prepared(torch.randint(0, 10, (7, 9)))
    converted = qcore.convert_fx(prepared)
    plan = qcore.explain(converted)
    assert plan.parts == ("blocks.0", "blocks.1", "head")
    (python,) = plan.python
    assert python.path == "" and python.type_name == "Encoder"
    assert "decides by the data in" in python.reason and "if (ids > 100).any():" in python.location
    assert f"graphs: {', '.join(plan.parts)}" in str(plan) and "(Encoder) stays Python: it decides" in str(plan)
    assert {d.operators for d in plan.floating if d.weights} == {("Embedding",)}
    assert plan.other_weights == 0
    result, expected = converted(ids), model(ids)
    assert list(result) == ["logits", "hidden"]
    close(result["logits"], expected["logits"])
    assert sum(decision.operators[0] == "linear" for decision in plan.quantized) == 9
    assert {decision.path for decision in plan.quantized} >= {"blocks.0.mlp.0", "head"}
    if backend == "reference":
        assert converted.state_dict()["blocks.0.mlp.0.weight"].dtype == torch.int8
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert torch.equal(again(ids)["logits"], result["logits"])
    with pytest.raises(errors.GuardError, match=r"blocks.0 \(Block\) was prepared for .* argument mask was None"):
        converted(ids, torch.zeros(5, 5))


def test_parts_that_saw_no_data_are_named():
    prepared = prepared_for(Encoder(), (torch.randint(0, 10, (2, 5)),))
    with pytest.raises(errors.CalibrationError, match="3 of the model's 3 parts weren't calibrated"):
        qcore.convert_fx(prepared)


class AsksForTheClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.first(x)
        return self.second(y) if type(y) is torch.Tensor else self.second(-y)


@torch.no_grad()
def test_what_the_replay_disproves_is_opened():
    torch.manual_seed(0)
    model = AsksForTheClass()
    x = torch.randn(2, 3, 8, 8)
    prepared = prepared_for(model, (x,))
    plan = qcore.explain(prepared)
    assert plan.parts == ("first", "second")
    assert "it gives other values than the module" in plan.python[0].reason
    assert torch.allclose(prepared(x), model(x), atol=1e-5)
    close(qcore.convert_fx(prepared)(x), model(x))


class Recorder(nn.Module):
    """Finds its blocks by their class and records what they give, as some libraries do."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(Block2(), Block2())

    def forward(self, x):
        seen = []
        hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o)) for m in self.modules() if type(m) is Block2]
        y = self.stage(x)
        for hook in hooks:
            hook.remove()
        return y + len(seen) if y.sum() > -1e9 else y


class Finder(Recorder):
    """Finds its blocks by their class alone."""

    def forward(self, x):
        y = self.stage(x) + sum(type(m) is Block2 for m in self.modules())
        return y if y.sum() > -1e9 else -y


class Block2(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "reason"),
    [(Recorder, "Block2 has a forward hook"), (Finder, "with a graph in its place the model fails")],
)
def test_modules_that_the_model_finds_by_their_class_stay_what_they_are(model, reason):
    model, x = model(), torch.randn(2, 4)
    prepared = prepared_for(model, (x,))
    plan = qcore.explain(prepared)
    assert plan.parts == ("stage.0.linear", "stage.1.linear")
    assert torch.allclose(prepared(x), model(x), atol=1e-5)
    assert any(reason in module.reason for module in plan.python)


class Decides(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


@torch.no_grad()
def test_a_module_called_in_several_forms_is_opened_or_handled():
    torch.manual_seed(0)
    inner = TwoForms()
    model = nn.Sequential()
    model.add_module("a", Decides(inner))
    x = torch.randn(3, 4)
    # Whole, `inner` is a graph in which both calls are traced; within a forward that isn't, it is a part of its own.
    assert qcore.explain(prepared_for(model, (x,))).parts == ("a.inner",)

    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x):
            y = self.scaled(x, 1.0)
            return self.scaled(y, 2.0) if y.sum() > -1e9 else y

    plan = qcore.explain(prepared_for(Loose(), (x,)))
    assert plan.parts == ("scaled.linear",)
    assert [module.reason for module in plan.python if module.path == "scaled"] == ["it is called in several forms"]


@torch.no_grad()
def test_the_report_says_what_would_let_more_be_traced():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), Decides(nn.Linear(8, 4)), nn.Softmax(-1)))
    x = torch.randn(2, 4)
    plan = qcore.explain(prepared_for(model, (x,)))
    assert plan.parts == ("0", "1.0", "1.1.inner")
    assert [module.path for module in plan.python] == ["", "1", "1.1"]
    line = "PrepareCustomConfig().set_non_traceable_module_names(['1.1'])"
    assert [line in str(module) for module in plan.python] == [True, True, False]
    custom = eval(f"qcore.{line}")
    followed = qcore.explain(prepared_for(model, (x,), prepare_custom_config=custom))
    assert followed.python == () and {d.path for d in followed.quantized} == {"0", "1.0"}
    # Of 2 * (32 + 64 + 32) multiply-adds, the last 32 are in the module that was kept whole.
    assert plan.multiply_add_share == 1.0 and plan.weight_share == 1.0


@torch.no_grad()
def test_modules_of_what_is_opened_late_are_tried_at_every_call():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Scaled(), nn.Linear(4, 4)

        def forward(self, x, scale):
            return self.second(self.first(x, scale))

    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            y = self.inner(x, 1.0)
            return self.inner(y, 2.0) if y.sum() > -1e9 else y

    torch.manual_seed(0)
    model, x = Loose(), torch.randn(2, 4)
    prepared = prepared_for(model, (x,))
    plan = qcore.explain(prepared)
    assert plan.parts == ("inner.first.linear", "inner.second")
    assert {module.path: module.reason for module in plan.python if module.path} == {
        "inner": "it is called in several forms", "inner.first": "it is called in several forms",
    }  # fmt: skip
    assert torch.allclose(prepared(x), model(x), atol=1e-6)
    close(qcore.convert_fx(prepared)(x), model(x))
