"""Records: what qcore knows of a graph goes with it, and a float model stands beside where one was asked for."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore.errors import GuardError
from qcore.fx.batches import ANY_CONVENTION
from qcore.fx.record import RECORD, FloatFallback, Record, Settings, host_of, plan_of, record_of, records
from qcore.quantization_plan import Decision, PythonModule, QuantizationPlan
from tests.models import Attention, close, prepared_for


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


SETTINGS = Settings("b", qcore.BackendConfig("b"), False, ANY_CONVENTION)


def decision(node, quantized=True, reason=""):
    return Decision(node, (node,), ("linear",), node, quantized, "global", reason=reason)


def recorded(module, plan, **more):
    vars(module)[RECORD] = Record("prepared", SETTINGS, plan, **more)
    return module


def test_a_report_tells_what_came_of_each_decision_and_the_plan_stays():
    plan = QuantizationPlan("b", (decision("a"), decision("b"), decision("c", False, "no pattern")))
    record = Record(
        "converted",
        SETTINGS,
        plan,
        observers={0: "o"},
        notes=("NaN",),
        kernels={"a": "Conv"},
        declined={"b": "too wide"},
    )
    report = record.report()
    assert [(d.kernel, d.reason) for d in report.decisions] == [("Conv", ""), ("", "too wide"), ("", "no pattern")]
    assert (report.observers, report.notes) == ({0: "o"}, ("NaN",))
    assert all(d.kernel == "" for d in plan.decisions) and plan.notes == ()
    assert copy.deepcopy(record) is record and pickle.loads(pickle.dumps(record)).report() == report


def test_records_are_those_of_the_host_and_of_its_parts_and_of_nothing_within_a_graph():
    python = PythonModule("", "Sequential", "it decides by data")
    inner = recorded(nn.Linear(2, 2), QuantizationPlan("b", (decision("a kernel's own"),)))
    part = recorded(nn.Sequential(inner), QuantizationPlan("b", (decision("x"),)))
    other = recorded(nn.Linear(2, 2), QuantizationPlan("b", (decision("y"),)))
    model = recorded(nn.Sequential(part, nn.Identity(), other), QuantizationPlan("b", (), python=(python,)))
    found = records(model)
    assert list(found) == ["", "0", "2"]
    assert [d.node for d in plan_of(found).decisions] == ["x", "y"]
    assert list(records(nn.Sequential(model))) == ["0", "0.0", "0.2"]
    assert records(nn.Linear(2, 2)) == {} == records("a string")
    assert list(records(part)) == [""]
    # A part whose path begins as another's is not within it.
    siblings = nn.ModuleDict({"a": part, "ab": other})
    assert list(records(siblings)) == ["a", "ab"]


def test_the_record_is_the_module_s_own():
    module = recorded(nn.Linear(2, 2), QuantizationPlan("b", ()))
    assert record_of(module) is vars(module)[RECORD] and record_of(nn.Sequential(module)) is None
    assert record_of(copy.deepcopy(module)) is record_of(module)


class Refuses(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        raise self.error


def test_only_a_guard_sends_a_call_to_the_float_model():
    x = torch.ones(2, 2)
    beside = FloatFallback(Refuses(GuardError("another form")), nn.Identity())
    assert beside(x) is x and host_of(beside) is beside.model and host_of(x) is x
    with pytest.raises(RuntimeError, match="of its own"):
        FloatFallback(Refuses(RuntimeError("of its own")), nn.Identity())(x)
    beside = FloatFallback(Refuses(GuardError("")), nn.Linear(2, 2)).eval()
    beside.half()
    assert beside.model.scale.dtype == beside.float_model.weight.dtype == torch.float32
    assert not FloatFallback(nn.Identity().eval(), nn.Identity()).training
