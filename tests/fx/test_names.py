"""The user's names and qcore's own side by side, and models that stay complete through copies and pickles."""

import copy
import keyword
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.fx.names import free_target, is_free, own_names
from tests.fx.around import Around, Host, Part, mapping, prepared_for


def converted_linear():
    x = torch.randn(2, 4)
    prepared = qcore.prepare_fx(nn.Sequential(nn.Linear(4, 4)).eval(), mapping("reference"), (x,), backend="reference")
    prepared(x)
    converted = qcore.convert_fx(prepared)
    converted(x)
    return converted


#: What qcore calls something of its own, now or ever, or what the code of a graph reads.
OF_QCORE = [
    "self", "Self", "SELF", "__self__", "args", "kwargs", "input", "torch", "_call_signature", "_result_structure",
    "_executor", "weight", "bias", "weight_scale", "weight_zero_point", "weight_qparams", "weight_int",
    "weight_int1", "activation_post_process_0", "activation_post_process_0_scale", "activation_post_process_1",
    "_tensor_constant0", "_tensor_constant1", "linear", "add", "x", "y", "quantize_per_tensor",
    "dequantize_per_channel",
]  # fmt: skip
#: What can't be written as an attribute, or is read as another.
UNWRITABLE = ["0", "12", "a-b", "a b", 'a"b', "a'b", "a\\b", "a\nb", "größe", "ﬁ", "fi", "²", *keyword.kwlist]
#: Every attribute of a module and of a graph; with one called ``training``, a module can't be set to evaluation.
OF_TORCH = sorted({*dir(nn.Module()), *dir(converted_linear())} - {"training"})
EVERY_NAME = list(dict.fromkeys((*OF_QCORE, *UNWRITABLE, *OF_TORCH)))
HOSTILE = [*OF_QCORE, "class", "12", 'a"b', "ﬁ", "type", "forward", "_modules", "T_destination", "__class__"]
HOSTILE += ["code", "graph", "meta", "recompile", "of", "finish", "add_submodule", "wrap_calls", "_is_raw"]


class Modules(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:  # As `self.name = module` does it; `add_module` refuses some of them.
            self._modules[name] = nn.Linear(4, 4)
        self.order = list(names)

    def forward(self, x):
        y = x
        for name in self.order:
            y = y + torch.relu(self._modules[name](x))
        return y


class Parameters(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self._parameters[name] = nn.Parameter(torch.randn(4, 4))
        self.order = list(names)

    def forward(self, x):
        y = x + torch.tensor([1.0, 2.0, 3.0, 4.0])
        for name in self.order:
            y = y + torch.relu(F.linear(x, self._parameters[name]))
        return y


class Buffers(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.first = nn.Linear(4, 4)
        for name in names:
            self._buffers[name] = torch.randn(4)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.order = list(names)

    def forward(self, x):
        y = self.first(x) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        for name in self.order:
            y = y + self._buffers[name]
        return F.linear(y, self.own)


PLACES = {"root": lambda model: model, "submodule": Around, "part": Host}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "copy": copy.copy}


def innocent(names):
    return [f"name_{number}_of_mine" for number in range(len(names))]


def outcomes(kind, names, place, backend, copies=()):
    """What the model of this kind gives at every stage, and what all copies of it give."""
    torch.manual_seed(0)
    model, x = PLACES[place](kind(names)), torch.randn(8, 4)
    prepared = prepared_for(model, x, backend)
    found = [model(x), prepared(x)]
    for stage in (prepared, qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)):
        found.extend(stage(x) for _ in range(4))
        for copied in copies:
            again = COPIES[copied](stage)
            found.append(again(x))
            if stage is prepared:
                found.extend((qcore.convert_to_reference_fx(again)(x), qcore.convert_fx(again)(x)))
        if stage is not prepared:
            twin = copy.deepcopy(stage)
            twin.load_state_dict({name: torch.ones_like(t) for name, t in twin.state_dict().items()})
            twin.load_state_dict(stage.state_dict())
            found.append(twin(x))
    return found


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [Modules, Parameters, Buffers])
def test_every_name_may_be_the_users(kind, place):
    # Whatever has an attribute of that name is copied by calling it.
    names = [name for name in EVERY_NAME if place != "part" or name != "__deepcopy__"]
    found = outcomes(kind, names, place, "reference")
    expected = outcomes(kind, innocent(names), place, "reference")
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(found)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "place"), [(Modules, "root"), (Modules, "part"), (Parameters, "submodule"), (Buffers, "part")]
)
def test_no_name_changes_a_kernel_or_gets_lost_in_a_copy(kind, place, installed_backend):
    found = outcomes(kind, HOSTILE, place, installed_backend, ("pickle", "copy"))
    expected = outcomes(kind, innocent(HOSTILE), place, installed_backend, ("pickle", "copy"))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(found)


@torch.no_grad()
def test_a_name_that_has_to_give_way_is_the_users_own_in_rules_and_plans():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self._modules["code"], self.kept = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.kept(self._modules["code"](x))

    x = torch.randn(8, 4)
    rules = mapping("reference").set_module_name("code", None)
    prepared = qcore.prepare_fx(Model().eval(), rules, (x,), backend="reference")
    first, second = qcore.explain(prepared).decisions
    assert (first.path, first.rule, first.quantized) == ("code", "module_name 'code'", False)
    assert (second.path, second.quantized) == ("kept", True)
    prepared(x)
    for model in (prepared, qcore.convert_fx(prepared)):
        assert {"code_1.weight", "code_1.bias", "kept.bias"} <= set(model.state_dict())
        assert isinstance(model.code, str)


@torch.no_grad()
def test_a_name_that_clashes_with_nothing_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.größe = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.weight_scale = nn.Parameter(torch.full((4,), 5.0))

        def forward(self, x):
            return F.linear(self.größe(self.conv(x).mean((2, 3))), self.weight) * self.weight_scale

    x = torch.randn(2, 3, 8, 8)
    model = Model()
    prepared = prepared_for(model, x, "reference")
    prepared(x)
    assert set(model.state_dict()) <= set(prepared.state_dict())
    found = {name: tensor.dtype for name, tensor in qcore.convert_fx(prepared).state_dict().items()}
    floats = {"conv.bias", "größe.bias", "weight_scale"}
    assert {name for name in model.state_dict() if found[name] == torch.float32} == floats
    assert {name for name in model.state_dict() if found[name] == torch.int8} == set(model.state_dict()) - floats
    weights = {f"{name}_qparams" for name in ("conv.weight", "größe.weight", "weight")}
    observers = set(qcore.explain(prepared).observers.values())
    own = {f"{name}.{value}" for name in weights | observers for value in ("scale", "zero_point")}
    assert set(found) == set(model.state_dict()) | own


@torch.no_grad()
def test_a_kernel_doesnt_take_the_place_of_a_float_weight_that_is_still_read(installed_backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) + (x[:, None] * self.linear.weight).sum(2)

    model, x = Model(), torch.randn(8, 4)
    prepared = prepared_for(model, x, installed_backend)
    prepared(x)
    for converted in (qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)):
        assert (converted(x) - model(x)).norm() < 0.05 * model(x).norm()
        assert torch.equal(converted.state_dict()["linear.weight"], model.linear.weight)


@torch.no_grad()
def test_inputs_whose_names_would_be_one_are_two():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, states, states_0, _0, self_):
            return self.linear(states[0]) - 2 * states_0 + _0 * self_["²"] + self_["self"]

    model, (a, b, c, d, e) = Model().eval(), torch.randn(5, 3, 4)
    inputs = ([a], b, c, {"²": d, "self": e})
    prepared = qcore.prepare_fx(model, mapping("reference"), inputs, backend="reference")
    assert torch.equal(prepared(*inputs), model(*inputs))


def test_free_names_are_free_of_modules_tensors_and_attributes():
    root = nn.Module()
    root.register_buffer("scale", torch.ones(1))
    root.add_module("inner", nn.Linear(2, 2))
    root.plain = 1
    taken = ("scale", "scale.weight", "inner", "inner.weight", "plain", "code", "type", "inner.type", "__len__", "if")
    assert [name for name in taken if is_free(root, name)] == []
    assert [name for name in ("inner.scale", "inner.code", "other.weight") if not is_free(root, name)] == []
    assert free_target("scale", root) == "scale_1"
    for number in range(1, 1001):
        root.register_buffer(f"scale_{number}", torch.ones(1))
    assert free_target("scale", root, nn.Module()) == "scale_1001"


class Reading(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.part = Part(**attributes)
        self.names = list(attributes)

    def forward(self, x):
        if x.sum() > 1e9:
            return x, None
        return self.part(x), [getattr(self.part, name) for name in self.names]


@torch.no_grad()
@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("name", ["code", "graph", "meta", "finish", "_graph", "_is_raw", "_part", "_reads", "mine"])
def test_a_part_answers_for_its_attributes_as_before(name, is_read):
    model, x = Reading(**{name: "mine"}), torch.randn(8, 4)
    model.names = [name] * is_read
    prepared = prepared_for(model, x, "reference")
    prepared(x)
    converted = qcore.convert_fx(prepared)
    for made in (prepared, converted, *(copied(converted) for copied in COPIES.values())):
        made.names = [name]
        assert made(x)[1] == ["mine"]
    hidden = name not in ("_part", "_reads", "mine")
    plan = qcore.explain(converted)
    assert plan.parts == (("part.first", "part.second") if hidden else ("part",))
    assert any(f"its attribute {name} would be hidden" in str(module) for module in plan.python) is hidden
    assert plan.weight_share == 1.0


class Rich(nn.Module):
    """Something of everything that a name can be of."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.leaf = nn.LSTM(4, 4, batch_first=True)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("mean", torch.randn(4), persistent=False)
        self.table, self.classes = torch.randn(4), ["a", "b"]
        nn.init.uniform_(self.bn.running_var, 0.5, 2)

    def forward(self, x):
        y = self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3))) + self.mean + self.table
        return F.linear(self.leaf(y[:, None])[0][:, 0], self.w)


NAMES_OF_RICH = ["conv", "bn", "head", "leaf", "w", "mean", "table", "classes"]


@torch.no_grad()
@pytest.mark.parametrize("names", [*([name] for name in NAMES_OF_RICH), NAMES_OF_RICH], ids="+".join)
def test_a_preserved_attribute_is_the_users_and_changes_no_bit(names, installed_backend):
    model, x = Rich(), torch.randn(5, 3, 8, 8)
    custom = qcore.PrepareCustomConfig().set_preserved_attributes(names)

    def stages(**options):
        prepared = prepared_for(model, x, installed_backend, **options)
        prepared(x)
        return prepared, qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)

    for found, plain in zip(stages(prepare_custom_config=custom), stages(), strict=True):
        for again in (found, *(copied(found) for copied in COPIES.values())):
            assert torch.equal(again(x), plain(x))
            assert "mean" not in again.state_dict()
            for name in names:
                mine, theirs = getattr(again, name), getattr(model, name)
                assert type(mine) is type(theirs) and mine is not theirs
                if isinstance(theirs, nn.Module):
                    state = theirs.state_dict()
                    assert {key: value.tolist() for key, value in mine.state_dict().items()} == {
                        key: value.tolist() for key, value in state.items()
                    }
                else:
                    assert torch.equal(mine, theirs) if isinstance(theirs, torch.Tensor) else mine == theirs
            if "leaf" in names:
                (called,) = (n.target for n in again.graph.nodes if n.op == "call_module" and "leaf" in n.target)
                assert again.get_submodule(called) is again.leaf


@pytest.mark.parametrize("name", ["code", "graph", "meta", "wrap_calls", "forward", "_modules"])
def test_an_attribute_that_a_graph_would_hide_cant_be_preserved(name):
    model = Rich().eval()
    if not hasattr(model, name):
        setattr(model, name, "mine")
    custom = qcore.PrepareCustomConfig().set_preserved_attributes([name])
    with pytest.raises(errors.ConfigError, match=f"'{name}' is an attribute that every GraphModule has"):
        prepared_for(model, torch.randn(5, 3, 8, 8), "reference", prepare_custom_config=custom)


@torch.no_grad()
def test_what_other_libraries_give_to_every_module_hides_nothing(monkeypatch):
    """As transformers does."""

    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if float(x.sum()) > 0 else self.linear(-x)

    monkeypatch.setattr(nn.Module, "given_by_another_library", lambda self: None, raising=False)
    own_names.cache_clear()
    try:
        prepared = qcore.prepare_fx(
            Decides().eval(), qcore.get_default_qconfig_mapping("reference"), (torch.ones(2, 4),)
        )
        assert qcore.explain(prepared).parts == ("linear",)
    finally:
        own_names.cache_clear()
