"""The GraphModule of all passes: copies and pickles hold all that it has, and nobody keeps it alive."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qcore
from qcore.fx.graph_module import (
    QGraphModule,
    adopt,
    delete_tensor,
    get_attribute,
    has_attribute,
    is_persistent,
    modules_of,
    own_tensors,
    set_tensor,
    submodule,
    tensors_of,
)
from qcore.fx.shapes import Example
from tests.fx.around import Host, Part, prepared_for

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "copy": copy.copy}


class Images(nn.Module):
    """Depthwise, a residual, a cat: where shapes matter to patterns and kernels."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.depthwise = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head, self.inner = nn.Linear(8, 4), nn.Module()
        self.inner.register_buffer("shift", torch.randn(8, 1, 1), persistent=False)
        self.inner.register_buffer("kept", torch.randn(8, 1, 1))
        self.register_buffer("mean", torch.randn(4), persistent=False)

    def forward(self, x):
        y = F.relu6(self.bn(self.conv(x)))
        y = self.depthwise(y) + y + self.inner.shift - self.inner.kept
        y = torch.cat([y, y[:, :4]], 1)[:, :8]
        return self.head(y.mean((2, 3))) + self.mean


FORMS = {"whole": lambda: (Images(), None), "parts": lambda: (Host(Images()), None)}


FORMS["fallback"] = lambda: (Images(), qcore.PrepareCustomConfig().set_guard_failure("float"))


def calibrated(form, backend):
    model, custom = FORMS[form]()
    x = torch.randn(2, 3, 8, 8)
    prepared = prepared_for(model, x, backend, prepare_custom_config=custom)
    prepared(x)
    return prepared, x


def graphs(model):
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def noted(model):
    return [[(n.name, n.op, str(n.target), n.meta.get("example")) for n in m.graph.nodes] for m in graphs(model)]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_knows_all_that_the_original_knows(copied, form, installed_backend):
    prepared, x = calibrated(form, installed_backend)
    again = COPIES[copied](prepared)
    assert noted(again) == noted(prepared)
    assert any(example is not None for nodes in noted(again) for *_, example in nodes)
    assert qcore.explain(again) == qcore.explain(prepared)
    assert list(again.state_dict()) == list(prepared.state_dict())
    assert torch.equal(again(x), prepared(x))
    for convert in (qcore.convert_to_reference_fx, qcore.convert_fx):
        wanted = convert(prepared)
        for found in (convert(again), COPIES[copied](wanted)):
            assert str(qcore.explain(found)) == str(qcore.explain(wanted))
            assert noted(found) == noted(wanted)
            assert [type(m).__name__ for m in found.modules()] == [type(m).__name__ for m in wanted.modules()]
            assert list(found.state_dict()) == list(wanted.state_dict())
            assert [m.training for m in found.modules()] == [m.training for m in wanted.modules()]
            assert all(torch.equal(found(x), wanted(x)) for _ in range(4))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_that_isnt_saved_isnt_saved_later_on(form, installed_backend):
    prepared, _ = calibrated(form, installed_backend)
    for model in (prepared, qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)):
        for again in (model, *(copied(model) for copied in COPIES.values())):
            saved = [name.rpartition(".")[2] for name in again.state_dict()]
            held = [name.rpartition(".")[2] for name, _ in again.named_buffers()]
            assert {"shift", "mean"} <= set(held) and not {"shift", "mean"} & set(saved) and "kept" in saved


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_nobody_holds_is_freed_at_once(form, installed_backend):
    gc.collect()
    gc.disable()
    try:
        prepared, x = calibrated(form, installed_backend)
        models = [prepared, qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)]
        models += [copied(model) for model in models for copied in COPIES.values()]
        for model in models:
            for _ in range(4):  # The third call is replayed.
                model(x)
        tensors = [weakref.ref(t) for model in models for t in (*model.parameters(), *model.buffers())]
        del prepared, models, model
        assert [found.shape for tensor in tensors if (found := tensor()) is not None] == []
    finally:
        gc.enable()


def test_a_graph_outlives_its_module():
    graph = qcore.fuse_fx(Part().eval()).graph
    assert graph.owning_module is None
    (between,) = [node for node in graph.nodes if node.target is torch.clamp]
    between.replace_all_uses_with(between.args[0])
    graph.erase_node(between)
    graph.lint()


class Shared(nn.Module):
    """A module in two others, and one Parameter in three layers."""

    def __init__(self, stays_python):
        super().__init__()
        shared, weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.first, self.second, self.last = Part(second=shared), Part(second=shared), nn.Linear(4, 4)
        self.first.first.weight = self.second.first.weight = self.last.weight = weight
        self.last.bias.requires_grad_(False)
        self.stays_python = stays_python

    def forward(self, x):
        if self.stays_python and x.sum() > 1e9:
            return x
        return self.last(self.second(self.first(x)))


def ties(model):
    by_tensor = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        by_tensor.setdefault(id(tensor), []).append(name)
    return sorted(names for names in by_tensor.values() if len(names) > 1)


@pytest.mark.parametrize("stays_python", [False, True])
def test_what_is_shared_stays_shared_and_right(stays_python, installed_backend):
    x = torch.randn(8, 4)

    def made(scale):
        model = Shared(stays_python)
        prepared = prepared_for(model, x, installed_backend)
        with torch.no_grad():
            assert torch.equal(prepared(scale * x), model(scale * x))
        return prepared

    prepared, other = made(1), made(3)
    converted = qcore.convert_fx(prepared)
    for model in (prepared, qcore.convert_to_reference_fx(prepared), converted):
        for copied in COPIES.values():
            again = copied(model)
            assert ties(again) == ties(model)
            flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
            assert [(name, p.requires_grad) for name, p in again.named_parameters()] == flags
            assert ("last.bias", True) not in flags
    if stays_python:
        assert ["first.first.weight", "second.first.weight", "last.weight"] in ties(prepared)
    other.load_state_dict(prepared.state_dict())
    assert ties(other) == ties(prepared)
    with torch.no_grad():
        assert torch.equal(other(x), prepared(x))
        assert torch.equal(qcore.convert_fx(other)(x), converted(x))


class Hides(nn.Module):
    """A class that has an attribute of the name of a parameter."""

    weight = "of the class"

    def __init__(self):
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.ones(2))
        self.inner = nn.Module()
        self.inner.register_buffer("saved", torch.zeros(1))
        self.inner.register_buffer("unsaved", torch.zeros(1), persistent=False)


def test_what_stands_at_a_path_is_what_is_registered_there():
    model = Hides()
    assert get_attribute(model, "weight") is model._parameters["weight"]
    assert get_attribute(model, "inner.saved") is model.inner.saved and submodule(model, "inner") is model.inner
    assert submodule(model, "") is model
    assert has_attribute(model, "inner.saved") and not has_attribute(model, "inner.gone")
    assert not has_attribute(model, "gone.saved")
    assert is_persistent(model, "inner.saved") and not is_persistent(model, "inner.unsaved")


def test_a_tensor_that_is_set_takes_the_place_of_whatever_was_there():
    model = Hides()
    set_tensor(model, "inner.unsaved", torch.ones(1))
    set_tensor(model, "inner.saved", nn.Parameter(torch.ones(1)))
    set_tensor(model, "new.deep.buffer", torch.ones(3), persistent=False)
    set_tensor(model, "weight", torch.ones(4))
    assert list(model.state_dict()) == ["weight", "inner.saved", "inner.unsaved"]
    assert isinstance(model.inner.saved, nn.Parameter) and model.new.deep.buffer.shape == (3,)
    assert dict(model.named_buffers()).keys() == {"weight", "inner.unsaved", "new.deep.buffer"}
    delete_tensor(model, "inner.saved")
    delete_tensor(model, "weight")
    assert list(model.state_dict()) == ["inner.unsaved"]


def test_an_attribute_is_adopted_as_what_it_was():
    source, module = Hides().inner, nn.Module()
    source.plain, source.layer = [1], nn.Linear(2, 2)
    for name in ("saved", "unsaved", "plain", "layer"):
        adopt(module, source, name)
    adopt(module, Hides(), "weight", lambda value: nn.Parameter(value.detach() * 2))
    assert list(module.state_dict()) == ["weight", "saved", "layer.weight", "layer.bias"]
    assert module.plain is source.plain and "plain" in vars(module) and module.unsaved is source.unsaved
    assert torch.equal(module.weight, torch.full((2,), 2.0))


def test_only_tensors_of_another_model_are_copied():
    foreign = nn.Sequential(nn.Linear(2, 2))
    module = nn.Module()
    module.first, module.second = nn.Module(), nn.Module()
    module.first.weight = module.second.weight = foreign[0].weight
    module.second.own = own = nn.Parameter(torch.zeros(1))
    made = {}
    own_tensors(module, foreign, lambda t: made.setdefault(id(t), nn.Parameter(t.detach().clone())))
    assert module.first.weight is module.second.weight is not foreign[0].weight
    assert module.second.own is own and len(made) == 1


def test_all_modules_once_and_all_tensors_with_plain_attributes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    model.again, model.plain, model.number = model[0], torch.ones(1), 3
    found = modules_of(model)
    assert list(map(id, found)) != [] and set(found) == set(model.modules()) and len(found) == 4
    assert [type(m) for m in modules_of(model, {id(model[1])})] == [nn.Sequential, nn.Linear]
    tensors = tensors_of(model)
    wanted = [*model.parameters(), *model.buffers(), model.plain]
    assert sorted(map(id, tensors)) == sorted(map(id, wanted))


def graph_of_overloads():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.add.Tensor, (x, x), {"alpha": 2})
    node = graph.call_function(torch._C._nn.gelu, (node,))
    node = graph.create_node("call_function", torch.cat, ([node, x], 1), name="an_odd_name_9")
    node.meta["example"] = Example((1, 4), torch.float32)
    graph.output({"a": node, "rest": (x, [None, slice(1, 2)])})
    return graph


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_nodes_keep_names_arguments_and_examples_and_any_function(copied):
    module = QGraphModule.of(nn.Module(), graph_of_overloads())
    module.meta["noted"] = "here"
    made = copied(module)

    def shown(m):
        return [(n.name, n.op, n.target, str(n.args), str(n.kwargs), n.meta.get("example")) for n in m.graph.nodes]

    assert shown(made) == shown(module) and made.meta == {"noted": "here"}
    assert made.graph is not module.graph
    x = torch.randn(1, 2)
    assert torch.equal(made(x)["a"], module(x)["a"]) and made(x)["rest"][1] == [None, slice(1, 2)]


def test_a_function_that_cannot_be_pickled_is_an_error_and_no_other_function():
    graph = torch.fx.Graph()
    graph.output(graph.call_function(lambda x: x, (graph.placeholder("x"),)))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(QGraphModule.of(nn.Module(), graph))


def test_code_of_a_raw_module_is_made_when_somebody_looks():
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    for look in (lambda m: m.code, str, lambda m: m.forward.__code__ and m(torch.ones(1)) and m.code):
        raw = QGraphModule.of(nn.Module(), copy.deepcopy(graph), is_raw=True)
        assert "torch.neg" in str(look(raw))
        assert torch.equal(raw(torch.ones(1)), -torch.ones(1))
