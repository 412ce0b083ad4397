"""Models that fx alone can't trace: sizes, constants, containers, in-place writes, and what has to stay Python."""

import copy
import dataclasses
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.fx.graph_module import QGraphModule


def prepared_for(model, example_inputs, **options):
    options.setdefault("backend", "reference")
    mapping = qcore.get_default_qconfig_mapping(options["backend"])
    return qcore.prepare_fx(model.eval(), mapping, example_inputs, **options)


def close(found, expected):
    """Within 5 % of its own size: int8 of small random networks is far better than that."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 0.05 * expected.norm()


class Attention(nn.Module):
    """Unpacks shapes, computes on them, makes tensors of sizes, branches on arguments, writes into a slice."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.register_buffer("positions", torch.arange(64)[None])

    def forward(self, x, mask=None, flag=True):
        batch, tokens, channels = x.shape
        q, k, v = (t.view(batch, tokens, 4, channels // 4).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if isinstance(mask, torch.Tensor):
            scores = scores + mask
        steps = torch.arange(tokens)
        assert isinstance(tokens, int) and not isinstance(x, (int, list))
        scores = scores + 0.01 * (steps[None, :] - self.positions[:, :tokens].transpose(0, 1)).abs()
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, channels) + torch.zeros(batch, tokens, 1)
        assert y.shape == x.shape and y.dim() == 3
        y[:, 0] = y[:, 0] * 2
        return self.out(y) if flag else y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.kind = "block"

    def forward(self, x, mask=None, **kwargs):
        x = x + self.attention(self.norm(x), mask)
        return {"hidden": x + self.mlp(x), "cache": None, "depth": 1}


class Encoder(nn.Module):
    """Decides by data, reads attributes of its blocks, passes dictionaries: its own forward can't be a graph."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 4)

    def forward(self, ids, mask=None):
        hidden = self.embedding(ids)
        if (ids > 100).any():
            hidden = hidden * 0
        for block in self.blocks:
            assert block.kind == "block"
            hidden = block(hidden, mask=mask)["hidden"]
        return {"logits": self.head(hidden.to(self.head.weight.dtype)), "hidden": hidden}


@torch.no_grad()
def test_sizes_stay_sizes_and_decisions_are_settled():
    torch.manual_seed(0)
    model = Attention()
    prepared = prepared_for(model, (torch.randn(2, 5, 16),))
    assert isinstance(prepared, QGraphModule)
    for shape in ((2, 5, 16), (7, 9, 16)):  # Another batch, another length.
        prepared(torch.randn(shape))
    converted = qcore.convert_fx(prepared)
    x = torch.randn(3, 8, 16)
    close(converted(x), model(x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert torch.equal(again(x), converted(x))


@torch.no_grad()
def test_keyword_inputs_positional_inputs_and_both():
    torch.manual_seed(0)
    model = Attention()
    x, mask = torch.randn(2, 5, 16), torch.randn(5, 5)
    for example_inputs in ({"x": x, "mask": mask}, (x, mask), ((x,), {"mask": mask})):
        prepared = prepared_for(model, example_inputs)
        assert torch.allclose(prepared(x, mask=mask), model(x, mask), atol=1e-5)
        qcore.calibrate(prepared, [{"mask": mask, "x": x}])
        close(qcore.convert_fx(prepared)(x, mask), model(x, mask))


def test_a_call_in_another_form_is_an_error_that_says_which_argument():
    x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
    prepared = prepared_for(Attention(), (x,))
    with pytest.raises(errors.GuardError, match="Attention .* argument mask was None at preparation and is a tensor"):
        prepared(x, mask)
    with pytest.raises(errors.GuardError, match="argument flag was True at preparation and is False now"):
        prepared(x, flag=False)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Attention()(x, other=1)


@torch.no_grad()
def test_or_goes_to_the_float_model_if_the_user_chose_so():
    torch.manual_seed(0)
    model = Attention()
    x, mask = torch.randn(2, 5, 16), torch.randn(5, 5)
    custom = qcore.PrepareCustomConfig().set_guard_failure("float")
    prepared = prepared_for(model, (x,), prepare_custom_config=custom)
    prepared(x)
    converted = qcore.convert_fx(prepared)
    assert torch.equal(converted(x, mask), model(x, mask))
    close(converted(x), model(x))
    assert not torch.equal(converted(x), model(x))
    assert qcore.explain(converted).quantized


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * 2 if x.shape[0] > 3 else self.linear(x)


def test_what_is_decided_by_a_size_is_guarded():
    prepared = prepared_for(Grows(), (torch.randn(2, 4),))
    prepared(torch.randn(3, 4))
    with pytest.raises(errors.GuardError, match=r"traced for gt\(x.size\(0\), 3\) = False, and now it is True"):
        prepared(torch.randn(8, 4))
    with pytest.raises(errors.GuardError, match=r"x.dim\(\) = 2, and now it is 3"):
        prepared(torch.randn(2, 2, 4))
    with torch.no_grad():
        converted = qcore.convert_fx(prepared)
    with pytest.raises(errors.GuardError):
        converted(torch.randn(8, 4))


class TakesConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, constant):
        return self.layer(x) * math.copysign(1.0, constant) * (2 if constant is True else 1)


@pytest.mark.parametrize(
    "constant, others",
    [(0.0, (-0.0, 0, False)), (1, (True, 1.0)), (True, (1, 1.0)), (math.nan, (-math.nan, 0.0)), (-0.0, (0.0,))],
)
def test_constants_of_a_call_are_compared_bit_for_bit(constant, others):
    model, x = TakesConstant(), torch.randn(2, 4)
    prepared = prepared_for(model, (x, constant))
    for again in (constant, float.fromhex(constant.hex()) if isinstance(constant, float) else constant):
        assert torch.equal(prepared(x, again), model(x, again))
    for other in others:
        with pytest.raises(errors.GuardError, match="argument constant was"):
            prepared(x, other)


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


def apply(function, *arguments):
    """Calls everything from one instruction."""
    return function(*arguments)


def one_after_another(calls):
    return [function(*arguments) for function, arguments in calls]


class DecidesInAHelper(nn.Module):
    def __init__(self, decide):
        super().__init__()
        self.layer, self.decide = nn.Linear(4, 4), decide

    def forward(self, x):
        return self.decide(self.layer(x), x.size(0))


def relu_as_often_as_rows(y, rows):
    for _ in apply(range, rows):
        y = apply(torch.relu, y) + 1
    return y


def range_and_reshape(y, rows):
    numbers, flat = one_after_another([(range, (rows,)), (torch.reshape, (y, (rows, -1)))])
    return flat * len(numbers)


def range_and_two_functions(y, rows):
    numbers, _, flat = one_after_another([(range, (rows,)), (torch.relu, (y,)), (torch.reshape, (y, (rows, -1)))])
    return flat * len(numbers)


@torch.no_grad()
@pytest.mark.parametrize("decide", [relu_as_often_as_rows, range_and_reshape, range_and_two_functions])
def test_a_guard_is_kept_whoever_asks_next_from_the_same_instruction(decide):
    model, x = DecidesInAHelper(decide), torch.randn(2, 4)
    prepared = prepared_for(model, (x,))
    assert torch.equal(prepared(x), model(x))
    with pytest.raises(errors.GuardError, match=r"x.size\(0\) = 2, and now it is 5"):
        prepared(torch.randn(5, 4))


SIZED = {
    "reshape": lambda y, n: torch.reshape(y, (n, -1)),
    "view": lambda y, n: y.view(n, -1),
    "factories": lambda y, n: torch.zeros(n, 4) + torch.full((n, 4), 2.0) + y.new_ones(n, 4) + y,
    "expand": lambda y, n: y[:1].expand(n, 4) + torch.broadcast_to(torch.ones(1, 4), (n, 4)),
    "interpolate": lambda y, n: F.interpolate(y[None, None], size=(n, 4))[0, 0],
    "slices": lambda y, n: y[:n] + torch.narrow(y, 0, 0, n) + torch.split(y, n)[0] + torch.roll(y, n, 0),
    "pad": lambda y, n: F.pad(y, (0, 0, 0, n))[:n],
    "from a helper": lambda y, n: apply(torch.reshape, y, (n, -1)) + apply(torch.tile, torch.ones(1, 4), (n, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SIZED)
def test_what_only_hands_a_size_on_settles_nothing(name):
    model = DecidesInAHelper(SIZED[name])
    prepared = prepared_for(model, (torch.randn(2, 4),))
    for batch in (2, 5, 3):
        x = torch.randn(batch, 4)
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


def test_rules_of_a_mapping_speak_of_parts_by_their_whole_names():
    mapping = qcore.get_default_qconfig_mapping("reference").set_module_name("blocks.1", None)
    mapping.set_object_type(nn.GELU, None).set_module_name("blocks.0.mlp.2", None)
    prepared = qcore.prepare_fx(Encoder().eval(), mapping, (torch.randint(0, 10, (2, 5)),), backend="reference")
    plan = qcore.explain(prepared)
    assert {d.path for d in plan.quantized if d.operators[0] == "linear"} == {
        "blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.0", "head",
    }  # fmt: skip
    assert {d.rule for d in plan.floating if d.path.startswith("blocks.1")} == {"module_name 'blocks.1'"}


def test_parts_that_saw_no_data_are_named():
    prepared = prepared_for(Encoder(), (torch.randint(0, 10, (2, 5)),))
    with pytest.raises(errors.CalibrationError, match="3 of the model's 3 parts weren't calibrated"):
        qcore.convert_fx(prepared)


class Overwrites(nn.Module):
    """In-place forms that give nothing back but change what was there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.mish = nn.Mish(inplace=True)

    def forward(self, x):
        y = self.first(x)
        self.mish(y)
        torch.neg_(y)
        same = y
        y **= 2
        F.threshold(same, 0.1, 0.0, inplace=True)
        count = kept = x.size(0)
        count += 1
        return self.second(y) * kept + count * 0 + torch.ones(1)


@torch.no_grad()
def test_in_place_forms_keep_their_effect():
    torch.manual_seed(0)
    model = Overwrites().eval()
    names = set(vars(model)) | set(dict(model.named_buffers()))
    prepared = prepared_for(model, (torch.randn(2, 3, 8, 8),))
    assert isinstance(prepared, QGraphModule)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 9, 9)
        assert torch.allclose(prepared(x), model(x), atol=1e-5)
    assert set(vars(model)) | set(dict(model.named_buffers())) == names  # The fresh tensor isn't left on it.


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


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    states: tuple


torch.utils._pytree.register_dataclass(Output)


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


@torch.fx.wrap
def wrapped(x, weight, bias):
    return F.linear(x * x.shape[0], weight, bias)


class Wraps(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return wrapped(x, self.linear.weight, self.linear.bias)


def test_a_function_that_was_wrapped_for_fx_is_looked_into():
    prepared = prepared_for(Wraps(), (torch.randn(2, 4),))
    assert [d.operators for d in qcore.explain(prepared).quantized] == [("linear",)]
    prepared(torch.randn(5, 4))


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.last = [x * 2]
        self.calls += 1
        return self.linear(x)


def test_a_forward_that_keeps_values_for_later_is_no_graph():
    model = Remembers()
    prepared = prepared_for(model, (torch.randn(2, 4),))
    (python,) = qcore.explain(prepared).python
    assert python.reason == "it keeps a value of this call in Remembers.calls for later calls"
    assert model.calls == prepared.calls == 0 and not hasattr(model, "last") and not hasattr(prepared, "last")
    prepared(torch.ones(2, 4))
    assert torch.equal(prepared.last[0], torch.full((2, 4), 2.0))


class TwoForms(nn.Module):
    """Calls one module with different constants, and another with different shapes."""

    def __init__(self):
        super().__init__()
        self.scaled, self.plain = Scaled(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.scaled(x, 1.0) + self.scaled(x, scale=2.0)
        return Output(self.plain(y), (self.plain(y[:1]), None))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.linear(x) * scale


@torch.no_grad()
def test_a_dataclass_comes_out_as_it_is():
    torch.manual_seed(0)
    model, x = TwoForms(), torch.randn(3, 4)
    prepared = prepared_for(model, (x,))
    assert isinstance(prepared, QGraphModule)
    prepared(x)
    result = qcore.convert_fx(prepared)(x)
    assert isinstance(result, Output) and result.states[1] is None
    close(result.logits, model(x).logits)


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


def test_shares_of_multiply_adds_and_weights():
    mapping = qcore.get_default_qconfig_mapping("reference").set_module_name("1", None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 2)).eval()
    prepared = qcore.prepare_fx(model, mapping, (torch.randn(1, 3, 6, 6),), backend="reference")
    plan = qcore.explain(prepared)
    assert [d.multiply_adds for d in plan.decisions] == [16 * 8 * 27, 16 * 4 * 8, 0, 128]
    assert plan.multiply_add_share == pytest.approx((3456 + 128) / (3456 + 512 + 128))
    assert plan.weight_share == pytest.approx((216 + 128) / (216 + 32 + 128))
    assert "(88% of multiply-adds, 91% of weights)" in plan.summary()


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


def test_what_is_settled_deep_in_a_model_needs_no_deep_recursion():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(1500):
                x = x + 1
            return self.linear(x) if x.shape[0] < 9 else x

    prepared = prepared_for(Deep(), (torch.randn(2, 4),))
    assert isinstance(prepared, QGraphModule)
    with pytest.raises(errors.GuardError, match=r"size\(0\)"):
        prepared(torch.randn(9, 4))


def test_tensors_that_are_no_parameters_and_no_buffers_are_copied_too():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.plain, self.listed = torch.ones(4), [torch.ones(4)]

        def forward(self, x):
            return self.linear(x + self.plain + self.listed[0])

    model = Holds()
    prepared = prepared_for(model, (torch.randn(2, 4),))
    theirs = {tensor.data_ptr() for tensor in (model.plain, model.listed[0], *model.parameters())}
    mine = {tensor.data_ptr() for tensor in (*prepared.parameters(), *prepared.buffers())}
    assert len(mine) > 3 and not mine & theirs


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


class Convolves(nn.Module):
    """Functional convolutions of every rank, with words for padding, without bias, without a batch."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4, *[3] * n)) for n in (1, 2, 3)])

    def forward(self, x):
        for n, weight in enumerate(self.weights):
            x = (F.conv1d, F.conv2d, F.conv3d)[n](x, weight, padding="same", stride=1)
            x = F.relu(x).unsqueeze(-1)
        return x


@torch.no_grad()
def test_functional_convolutions_with_words_for_padding(installed_backend):
    torch.manual_seed(0)
    model, x = Convolves(), torch.randn(4, 9)
    prepared = prepared_for(model, (x,), backend=installed_backend)
    for _ in range(3):
        prepared(torch.randn(4, 9))
    prepared(x)
    plan = qcore.explain(prepared)
    assert [d.operators[0] for d in plan.quantized if d.weights] == ["conv1d", "conv2d", "conv3d"]
    expected = model(x)
    assert (qcore.convert_fx(prepared)(x) - expected).norm() < 0.1 * expected.norm()


class Scaled2(Scaled):
    def forward(self, x):
        return super().forward(x, 2.0)


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


def merges(forward):
    """As libraries do: what isn't given is filled in, what is given by position can't be filled in again."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **{"doubled": self.doubled, **kwargs})

    return wrapper


class Merges(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.doubled, self.inner = nn.Linear(4, 4), True, inner

    @merges
    def forward(self, x, mask=None, doubled=None, **options):
        y = self.linear(x) if mask is None else self.linear(x) + mask
        y = y if self.inner is None else self.inner(y)
        return y * 2 if doubled else y


@torch.no_grad()
@pytest.mark.parametrize(
    "inputs", [lambda x: (x,), lambda x: {"x": x}, lambda x: ((x,), {"mask": x}), lambda x: ((x,), {"doubled": False})]
)
def test_only_what_was_given_is_passed_on_and_as_it_was(inputs):
    torch.manual_seed(0)
    x, model = torch.randn(2, 4), Merges(Merges()).eval()
    args, kwargs = qcore.quantize_fx._call(inputs(x))
    prepared = pickle.loads(pickle.dumps(prepared_for(model, inputs(x))))
    assert isinstance(prepared, QGraphModule) and len([d for d in qcore.explain(prepared).quantized if d.weights]) == 2
    assert torch.allclose(prepared(*args, **kwargs), model(*args, **kwargs), atol=1e-6)
    with pytest.raises(errors.GuardError, match="Merges was prepared for one form of call"):
        prepared(x, doubled=True)  # To the function around the forward that is no default.


ONES = torch.ones(1)


class Defaults(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x, mask=None, *, flag=True, activation=torch.relu, shift=ONES):
        return activation(self.linear(x)) + shift if flag else self.linear(x)


def test_a_default_that_is_given_is_the_same_call():
    x, model = torch.randn(2, 4), Defaults()
    prepared = prepared_for(model, (x,))
    assert isinstance(prepared, QGraphModule)
    for kwargs in ({}, {"mask": None}, {"flag": True}, {"mask": None, "flag": True}):
        assert torch.allclose(prepared(x, **kwargs), model(x), atol=1e-6)
    for kwargs in ({"flag": False}, {"mask": x}, {"shift": torch.zeros(1)}):
        with pytest.raises(errors.GuardError):
            prepared(x, **kwargs)
    assert torch.allclose(prepared_for(model, (x, None))(x), model(x), atol=1e-6)


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
