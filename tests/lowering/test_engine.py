"""Lowering by an engine that compiles subgraphs: explain(), parts, pickling, state and guards, and conformance."""

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.errors import GuardError, LoweringError, NotSupportedError
from qcore.lowering import EngineCall, lower_with_engine
from qcore.lowering.engine import MAX_SHAPES
from qcore.plugins.hookspecs import PLUGIN_API, BackendInfo, hookimpl
from qcore.testing import CASES, BackendConformance, plugged_in
from tests.lowering import engine_backend

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with plugged_in(engine_backend.NAME, engine_backend):
        yield


class TestConformance(BackendConformance):
    backend = engine_backend.NAME
    declines = {  # noqa: RUF012
        case.name: "doesn't take it" for case in CASES if case.name.split()[0] in engine_backend.UNKNOWN
    }


class Net(nn.Module):
    """Two convolutions around a part that the engine doesn't take, and a sum across it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x, doubled=False):
        x = F.relu(self.first(x))
        y = self.second(torch.softmax(x, 1))
        return self.head((x + y).mean((2, 3))) * (2 if doubled else 1)


class Around(nn.Module):
    """A model that decides by data, so that it stays Python around its parts."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Net(), Net()
        self.title = "two nets"

    def forward(self, x):
        one, other = self.one(x), self.other(x)
        return one if x.sum() > 0 else other - one


def both(model, *inputs, backend=engine_backend.NAME, **arguments):
    """The reference model and the converted one."""
    mapping = qcore.get_default_qconfig_mapping(backend)
    prepared = qcore.prepare_fx(model.eval(), mapping, inputs, backend=backend, **arguments)
    qcore.calibrate(prepared, [inputs])
    return qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)


def calls(model):
    return [module for module in model.modules() if isinstance(module, EngineCall)]


def test_the_largest_subgraphs_are_one_call_each():
    reference, converted = both(Net(), X)
    assert len(calls(converted)) == 2  # Before and after the softmax; the sum reads from both.
    assert torch.equal(converted(X), reference(X))
    batch = torch.randn(5, 3, 8, 8)
    assert torch.equal(converted(batch), reference(batch))


def test_explain_names_the_engine_and_what_it_does_not_take():
    _, converted = both(Net(), X)
    plan = qcore.explain(converted)
    assert {d.operators[0]: d.kernel for d in plan.quantized} == {
        "conv2d": "interpreter", "softmax": "", "add": "interpreter", "mean": "interpreter", "linear": "interpreter",
        "mul": "interpreter",
    }  # fmt: skip
    assert "interpreter" in str(plan)
    mapping = qcore.get_default_qconfig_mapping("interpreter").set_object_type(torch.softmax, _asked())
    prepared = qcore.prepare_fx(Net().eval(), mapping, (X,), backend="interpreter")
    prepared(X)
    plan = qcore.explain(qcore.convert_fx(prepared))
    (softmax,) = [d for d in plan.quantized if d.operators == ("softmax",)]
    assert softmax.kernel == "" and "interpreter doesn't take it" in softmax.reason


def _asked():
    return qcore.get_default_qconfig_mapping("interpreter").global_qconfig


def test_it_compiles_once_for_each_shape_and_again_when_the_state_changes():
    reference, converted = both(nn.Sequential(nn.Conv2d(3, 4, 1)), X)
    assert all(call._made[2] for call in calls(converted))  # It was run beside the reference model.
    converted, _ = copy.deepcopy(converted), engine_backend.compiled.clear()
    for _ in range(3):
        converted(X)
    converted(X[:1])
    assert [inputs[0].shape for inputs in engine_backend.compiled] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    state = {name: value.clone() for name, value in converted.state_dict().items()}
    for value in converted.state_dict().values():
        if value.dtype == torch.int8:
            value.neg_()
    assert not torch.equal(converted(X), reference(X))
    converted.load_state_dict(state)
    assert torch.equal(converted(X), reference(X))


def test_a_model_that_is_converted_in_inference_mode_hears_of_its_state():
    with torch.inference_mode():
        reference, converted = both(nn.Sequential(nn.Conv2d(3, 4, 1)), X.clone())
        before = converted(X)
        state = {name: value.clone() for name, value in converted.state_dict().items()}
    for value in converted.state_dict().values():
        if value.dtype == torch.int8:
            value.neg_()
    assert not torch.equal(converted(X), before)
    converted.load_state_dict(state)
    assert torch.equal(converted(X), before) and torch.equal(reference(X), before)


def test_copies_and_pickles_compute_the_same_and_hold_nothing_compiled():
    reference, converted = both(Net(), X)
    expected = converted(X)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert all(call._made == ((), (), {}) for call in calls(other))
        assert torch.equal(other(X), expected)
        assert qcore.explain(other) == qcore.explain(converted)
    assert torch.equal(expected, reference(X))


def test_parts_of_a_model_that_stays_python_are_engine_calls():
    reference, converted = both(Around(), X)
    assert isinstance(converted, Around) and converted.title == "two nets"
    assert len(calls(converted)) == 4
    for x in (X.abs(), -X.abs()):
        assert torch.equal(converted(x), reference(x))
    plan = qcore.explain(converted)
    assert plan.parts == ("one", "other") and {d.kernel for d in plan.quantized} == {"interpreter", ""}


def test_preserved_attributes_and_guards_are_kept():
    model = Net()
    model.labels = ["a", "b"]
    config = qcore.PrepareCustomConfig().set_preserved_attributes(["labels"])
    _, converted = both(model, X, True, prepare_custom_config=config)
    assert converted.labels == ["a", "b"]
    converted(X, True)
    with pytest.raises(GuardError, match="argument doubled was True"):
        converted(X, False)


def test_callers_are_told_what_they_must_know():
    _, converted = both(Net(), X)
    rows = torch.func.vmap(converted)(torch.stack([X, 2 * X]))
    assert torch.equal(rows, torch.stack([converted(X), converted(2 * X)]))
    x = X.clone().requires_grad_()
    with pytest.raises(NotSupportedError, match="a gradient was asked for"):
        converted(x).sum().backward()


def test_values_of_two_levels_never_wait_for_each_other():
    class Braid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            z = self.b(torch.softmax(y, -1))
            return self.c(y * z + torch.softmax(z, -1) * y), z

    x = torch.randn(3, 4)
    reference, converted = both(Braid(), x)
    for found, wanted in zip(converted(x), reference(x), strict=True):
        assert torch.equal(found, wanted)


def test_an_input_is_written_after_all_that_reads_it():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.second(torch.softmax(self.first(x), -1))
            y = y * x
            x.add_(1)
            return y

    x = torch.randn(3, 4)
    reference, converted = both(Writing(), x.clone())
    mine, theirs = x.clone(), x.clone()
    assert torch.equal(converted(mine), reference(theirs))
    assert torch.equal(mine, x + 1) and torch.equal(theirs, x + 1)


def test_state_that_is_assigned_is_heard_wherever_it_lies():
    _, converted = both(nn.Sequential(nn.Conv2d(3, 4, 1)), X)
    (call,) = calls(converted)
    weight = call.subgraph.get_submodule("0")
    for value in (1, 2, 3, 4):  # A tensor may get the place of one that is gone.
        weight.weight = torch.full_like(weight.weight, value)
        expected = copy.deepcopy(converted)(X)
        assert torch.equal(converted(X), expected)
    with torch.inference_mode():
        weight.weight = torch.full_like(weight.weight, 5)
        before = converted(X).clone()
        weight.weight.fill_(6)  # Nobody counts the writes into such.
        assert not torch.equal(converted(X), before)


def test_what_was_compiled_for_old_shapes_is_dropped():
    reference, converted = both(nn.Sequential(nn.Conv2d(3, 4, 1)), X)
    (call,) = calls(converted)
    for size in range(1, 2 * MAX_SHAPES):
        x = torch.randn(1, 3, size, 2)
        assert torch.equal(converted(x), reference(x))
    assert len(call._made[2]) == MAX_SHAPES


def test_an_engine_that_computes_something_else_is_found_when_it_lowers():
    def wrong(graph, inputs):
        return lambda *given: [10 * result for result in engine_backend.Program(graph)(*given)]

    plugin = SimpleNamespace(**{name: hook for name, hook in vars(engine_backend).items() if name.startswith("qcore_")})
    plugin.qcore_backend_info = hookimpl(lambda: BackendInfo("wrong", PLUGIN_API))
    plugin.qcore_lower = hookimpl(lambda model: lower_with_engine(model, engine_backend.takes, wrong, name="wrong"))
    with plugged_in("wrong", plugin), pytest.raises(LoweringError, match="isn't the one it was given: its results"):
        both(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4), backend="wrong")


def test_what_is_split_stays_with_its_pieces():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(4, 4)

        def forward(self, x):
            a, b = self.inner(x).chunk(2, -1)
            return self.outer(a * b)

    x = torch.randn(3, 4)
    reference, converted = both(Gated(), x)
    assert torch.equal(converted(x), reference(x)) and len(calls(converted)) == 1
