"""The answer of ``qcore_lower``: any module that stands for the reference model, and what it says of the decisions."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore.errors import LoweringError
from qcore.fx.record import record_of
from qcore.lowering import Lowered
from qcore.testing import FakeBackend
from tests.lowering.fake import lowered, same

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MODEL = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Program(nn.Module):
    """Somebody's runtime: no graph of fx's, of which qcore knows nothing."""

    def __init__(self, model):
        super().__init__()
        self.title = "a program"
        self.code = copy.deepcopy(model)

    def forward(self, *args, **kwargs):
        return self.code(*args, **kwargs)


def named(model, name="program"):
    """A name for each decision."""
    return {decision.node: name for decision in qcore.explain(model).quantized}


class Compiling(FakeBackend):
    """A backend whose hook answers with what a function makes of the reference model."""

    def __init__(self, answer=lambda model: Lowered(Program(model), named(model))):
        self.answer = answer
        self.seen = []

    def lower(self, model):
        self.seen.append(model)
        return self.answer(model)


class Host(nn.Module):
    """Decides by data, so that it stays Python around its parts."""

    def __init__(self):
        super().__init__()
        self.one, self.other = copy.deepcopy(MODEL), copy.deepcopy(MODEL)

    def forward(self, x):
        one, other = self.one(x), self.other(x)
        return one if x.sum() > 0 else other


def refused(answer, message, model=MODEL):
    with pytest.raises(LoweringError, match=message) as caught:
        lowered(Compiling(answer), model, X)
    assert (caught.value.backend, caught.value.hook) == ("fake", "qcore_lower")


class TestWhatIsRefused:
    @pytest.mark.parametrize("field", ["kernels", "declined"])
    def test_decisions_that_there_are_not(self, field):
        def answer(model):
            return Lowered(model, **{field: {**named(model), "_7": "program", "gone": "program"}})

        refused(answer, "named kernels for '_7', 'gone', which no decision of the plan is about")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda model: Program(model), "returned a .*Program, not a .*Lowered; give Lowered.module."),
            (lambda model: model, "returned a .*, not a .*Lowered; give Lowered.module."),
            (lambda model: (model, {}), "returned a tuple, not a .*Lowered"),
            (lambda model: None, "returned None, not a .*Lowered"),
            (lambda model: Lowered(None), "Lowered.module=None., which is no Module"),
            (lambda model: Lowered(Program), "Lowered.module=<class .*Program'>., which is no Module"),
            (lambda model: Lowered(model.forward), "which is no Module"),
            (lambda model: Lowered(model, list(named(model))), "Lowered.kernels=.'_1', '_2'.., which is no Mapping"),
            (lambda model: Lowered(model, declined=None), "Lowered.declined=None., which is no Mapping"),
            (lambda model: Lowered(model, {"_0": None}), "kernels={'_0': None}., which doesn't map names to names"),
            (lambda model: Lowered(model, {7: "program"}), "kernels={7: 'program'}., which doesn't map"),
            (lambda model: Lowered(model, {}, {"_0": ValueError("no")}), "declined={'_0': ValueError.*doesn't map"),
        ],
    )
    def test_wrong_types(self, answer, message):
        refused(answer, message)

    def test_another_model(self):
        def answer(model):
            changed = Program(model)
            changed.register_forward_hook(lambda module, args, result: 2 * result)
            return Lowered(changed, named(model))

        refused(answer, "isn't the one it was given: its results differ")
        # Only who says that he carried out each decision of this very model isn't asked to show it.
        refused(lambda model: Lowered(answer(model).module, reference=copy.deepcopy(model)), "its results differ")

    def test_a_part_of_a_host_is_looked_at_as_a_model_is(self):
        refused(lambda model: Lowered(nn.Identity()), "isn't the one it was given: it gives", Host())


class TestARawModule:
    """That is no graph of qcore's."""

    def test_it_is_what_convert_returns_with_all_that_explain_tells(self):
        backend = Compiling()
        reference, converted = lowered(backend, MODEL, X)
        assert type(converted) is Program and converted.title == "a program" and same(reference, converted, X)
        record = record_of(converted)
        assert record.stage == "converted" and record.settings.backend == "fake" and record.native == frozenset()
        plan = qcore.explain(converted)
        assert [(d.operators, d.kernel, d.reason) for d in plan.decisions] == [
            (("linear", "relu"), "program", ""), (("linear",), "program", ""),
        ]  # fmt: skip
        assert str(plan).count("program") == 2
        # The model within it has a record of its own, which speaks of the same decisions once more.
        assert record_of(converted.code).stage == "reference" and len(plan.decisions) == 2
        assert record_of(backend.seen[0]).kernels == {}

    def test_what_it_declines_is_told(self):
        def answer(model):
            first, last = named(model)
            return Lowered(Program(model), {last: "program"}, {first: "too wide"})

        _, converted = lowered(Compiling(answer), MODEL, X)
        assert [(d.kernel, d.reason) for d in qcore.explain(converted).decisions] == [("", "too wide"), ("program", "")]

    def test_copies_and_pickles(self):
        _, converted = lowered(Compiling(), MODEL, X)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), copy.copy(converted)):
            assert type(other) is Program and torch.equal(other(X), converted(X))
            assert qcore.explain(other) == qcore.explain(converted) and record_of(other).stage == "converted"
        twin = lowered(Compiling(), MODEL, 5 * X)[1]
        twin.load_state_dict(converted.state_dict())
        assert torch.equal(twin(X), converted(X))

    def test_preserved_attributes(self):
        model = copy.deepcopy(MODEL)
        model.labels, model.title = ["a", "b"], "a model"
        model.register_buffer("mean", torch.ones(3), persistent=False)
        config = qcore.PrepareCustomConfig().set_preserved_attributes(["labels", "title", "mean"])
        _, converted = lowered(Compiling(), model, X, prepare_custom_config=config)
        assert converted.labels == ["a", "b"] and torch.equal(dict(converted.named_buffers())["mean"], torch.ones(3))
        assert not any(name.startswith("mean") for name in converted.state_dict())
        assert converted.title == "a program"  # What the backend's module has itself is its own.
        assert copy.deepcopy(converted).labels == ["a", "b"] == pickle.loads(pickle.dumps(converted)).labels

    def test_it_is_in_the_mode_of_the_model(self):
        _, converted = lowered(Compiling(), MODEL, X)
        assert not any(module.training for module in converted.modules())

    def test_parts_of_a_host(self):
        backend = Compiling()
        reference, converted = lowered(backend, Host(), X)
        assert type(converted) is Host and type(converted.one) is type(converted.other) is Program
        assert len(backend.seen) == 2 and not any(module.training for module in converted.modules())
        for x in (X.abs(), -X.abs()):
            assert same(reference, converted, x)
        plan = qcore.explain(converted)
        assert plan.parts == ("one", "other") and [d.kernel for d in plan.quantized] == ["program"] * 4
        assert [d.kernel for d in qcore.explain(converted.one).quantized] == ["program"] * 2
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(other(X), converted(X)) and qcore.explain(other) == plan

    def test_guards_are_those_of_the_reference_model_within(self):
        class Settled(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = copy.deepcopy(MODEL)

            def forward(self, x, times=1):
                return self.layers(x) * times

        _, converted = lowered(Compiling(), Settled(), X, 2)
        converted(X, 2)
        with pytest.raises(qcore.errors.GuardError, match="argument times was 2"):
            converted(X, 3)

    def test_it_is_no_model_to_convert_again(self):
        _, converted = lowered(Compiling(), MODEL, X)
        with pytest.raises(qcore.errors.QcoreError):
            qcore.convert_fx(converted)


class TestTheReferenceModelItself:
    def test_it_runs_and_says_so(self):
        reference, converted = lowered(Compiling(Lowered), MODEL, X)
        assert record_of(converted).stage == "reference" and same(reference, converted, X)
        assert [d.kernel for d in qcore.explain(converted).quantized] == ["", ""]

    def test_why_it_runs_is_told(self):
        def answer(model):
            first, last = named(model)
            return Lowered(model, {last: "as written"}, {first: "no such unit on this chip"})

        reference, converted = lowered(Compiling(answer), MODEL, X)
        found = [(d.kernel, d.reason) for d in qcore.explain(converted).decisions]
        assert found == [("", "no such unit on this chip"), ("as written", "")]
        assert same(reference, converted, X) and qcore.explain(copy.deepcopy(converted)) == qcore.explain(converted)
        assert [d.reason for d in qcore.explain(reference).decisions] == ["", ""]

    def test_in_a_host(self):
        reference, converted = lowered(Compiling(Lowered), Host(), X)
        assert type(converted) is Host and same(reference, converted, X) and same(reference, converted, -X)

    def test_it_keeps_its_gradients(self):
        _, converted = lowered(Compiling(Lowered), MODEL, X)
        x = X.clone().requires_grad_()
        converted(x).sum().backward()
        assert bool((x.grad != 0).any())
