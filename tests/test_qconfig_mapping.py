"""Which rule of a QConfigMapping speaks of which operator."""

import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore import QConfigMapping
from qcore.errors import ConfigError
from tests.rules import Outer, prepare, q


def test_the_dictionary_form_goes_both_ways():
    mapping = (
        QConfigMapping().set_global(q(1)).set_object_type("relu", None).set_module_name_regex("a.*", q(2))
        .set_module_name("b", q(3)).set_module_name_object_type_order("c", nn.Linear, 2, q(4))
    )  # fmt: skip
    assert QConfigMapping.from_dict(mapping.to_dict()).rules() == mapping.rules()
    with pytest.raises(ConfigError, match=r"unknown keys \['module'\]"):
        QConfigMapping.from_dict({"module": []})


def test_the_dictionary_form_of_a_mapping_without_a_global_rule_has_none_either():
    mapping = QConfigMapping().set_object_type(nn.Linear, q(1))
    assert "" not in mapping.to_dict()
    assert QConfigMapping.from_dict(mapping.to_dict()).rules() == mapping.rules()
    float_mapping = QConfigMapping().set_global(None)
    assert QConfigMapping.from_dict(float_mapping.to_dict()).rules() == float_mapping.rules()


def test_a_dictionary_does_for_a_mapping():
    prepared = qcore.prepare_fx(Outer().eval(), {"": q(255)}, (torch.randn(2, 4),), backend="reference")
    assert {d.rule for d in qcore.explain(prepared).decisions} == {"global"}


def test_mappings_and_qconfigs_pickle_compare_and_print():
    mapping = QConfigMapping().set_global(q(1)).set_object_type(nn.Linear, None)
    assert pickle.loads(pickle.dumps(mapping)).rules() == mapping.rules()
    assert q(1) == q(1) and q(1) != q(2) and hash(q(1)) == hash(q(1))
    assert "object_type Linear: None" in repr(mapping)
    assert "MinMaxObserver(quant_max=1, quant_min=0)" in repr(mapping)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Linear", "did you mean torch.nn.Linear?"), ("torch.nn.Linear", "did you mean torch.nn.Linear?"),
        ("nn.ReLU6", "did you mean torch.nn.ReLU6?"), ("linear", "did you mean torch.nn.functional.linear?"),
        ("torch.relu", "did you mean"),
        ("Linaer", "did you mean torch.nn.Linear?"), ("reshap", "did you mean 'reshape'"),
        ("xyzzy", "not by its name$"), ("", "not by its name$"),
    ],
)  # fmt: skip
def test_a_string_that_is_no_method_s_name(text, meant):
    if text == "torch.relu":  # A method has that name, too, and the string would never match.
        assert hasattr(torch.Tensor, "relu")
    for set_it in (
        lambda: QConfigMapping().set_object_type(text, q(1)),
        lambda: QConfigMapping().set_module_name_object_type_order("", text, 0, q(1)),
    ):
        with pytest.raises(ConfigError, match=meant):
            set_it()


@pytest.mark.parametrize("name", ["add", "relu_", "reshape", "__matmul__", "shape"])
def test_names_of_methods_are_taken(name):
    QConfigMapping().set_object_type(name, q(1)).set_module_name_object_type_order("", name, 0, None)


class Several(nn.Module):
    """Calls with several results, in a graph or not."""

    def __init__(self, traceable):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.tail = nn.ModuleList([nn.Linear(3, 3), nn.ReLU()])
        self.traceable = traceable

    def forward(self, ids):
        y, (hidden, _) = self.lstm(self.table(ids))
        if not self.traceable and hidden.sum() > 1e6:
            return y
        y = self.tail[1](self.tail[0](y))
        return torch.topk(y, 2)[0]


WEIGHTS = {"Embedding": 36, "LSTM": 4 * 3 * (4 + 3), "linear": 9}


def several(mapping, traceable, **arguments):
    ids = torch.randint(0, 9, (2, 5))
    return qcore.prepare_fx(Several(traceable).eval(), mapping, (ids,), backend="reference", **arguments)


@pytest.mark.parametrize("traceable", [True, False], ids=["graph", "Python"])
def test_a_leaf_module_without_a_pattern_has_a_decision_and_its_weights_count(traceable):
    plan = qcore.explain(several(QConfigMapping().set_global(q(1)), traceable, on_unsupported="error"))
    assert len(plan.python) == (0 if traceable else 1)
    found = {d.operators[0]: d for d in plan.decisions}
    assert {name: found[name].weights for name in WEIGHTS} == WEIGHTS
    for name in ("Embedding", "LSTM"):
        assert (found[name].rule, found[name].reason) == ("global", "reference has no pattern for it")
    assert found["linear"].quantized and plan.weight_share == 9 / sum(WEIGHTS.values())
    if traceable:  # Ten steps of the recurrent weights, and ten rows of the linear layer.
        assert plan.multiply_add_share == 9 / (9 + WEIGHTS["LSTM"])
    else:
        (clamp,) = (d for d in plan.decisions if d.path == "tail.1")
        assert clamp.reason == "it stays Python: it is called by what stays Python"


@pytest.mark.parametrize("traceable", [True, False], ids=["graph", "Python"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.set_object_type(nn.LSTM, q(2)),
        lambda m: m.set_object_type(nn.Embedding, q(2)),
        lambda m: m.set_module_name("lstm", q(2)),
        lambda m: m.set_module_name_regex("l.*m", q(2)),
        lambda m: m.set_module_name_object_type_order("", nn.LSTM, 0, q(2)),
    ],
    ids=["class", "embedding", "name", "regex", "order"],
)
def test_what_is_asked_for_and_has_no_pattern_is_refused(ask, traceable):
    mapping = ask(QConfigMapping().set_object_type(nn.Linear, q(1)))
    wanted = "(LSTM|Embedding) at (lstm|table) .*: reference has no pattern for it"
    with pytest.raises(qcore.errors.UnsupportedQConfigError, match=wanted) as caught:
        several(mapping, traceable, on_unsupported="error")
    assert len(caught.value.problems) == 1
    with pytest.warns(qcore.errors.UnsupportedQConfigWarning, match=wanted):
        several(mapping, traceable)
    plan = qcore.explain(several(mapping, traceable, on_unsupported="ignore"))
    (refused,) = (d for d in plan.floating if d.rule)
    assert refused.reason == "reference has no pattern for it" and refused.weights


def test_a_function_with_several_results_is_refused_by_name():
    mapping = QConfigMapping().set_object_type(nn.Linear, q(1)).set_object_type(torch.topk, q(2))
    with pytest.raises(qcore.errors.UnsupportedQConfigError, match="topk at topk .*reference has no pattern for it"):
        several(mapping, True, on_unsupported="error")


def test_a_rule_for_a_container_is_broken_only_if_it_quantizes_nothing():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.Sequential(nn.LayerNorm(4), nn.LogSoftmax(1))
            self.mixed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

        def forward(self, x):
            return self.mixed(self.norms(x))

    def asked(setter, what):
        mapping = getattr(QConfigMapping(), setter)(what, q(2)).set_object_type(nn.Linear, q(1))
        return prepare(mapping, Normed().eval(), on_unsupported="error")

    asked("set_module_name", "mixed")
    asked("set_module_name_regex", "m")
    for setter, what in (("set_module_name", "norms"), ("set_module_name_regex", "norms")):
        with pytest.raises(qcore.errors.UnsupportedQConfigError) as caught:
            asked(setter, what)
        assert [problem.split(" (rule")[0] for problem in caught.value.problems] == [
            "LayerNorm at norms.0", "LogSoftmax at norms.1",
        ]  # fmt: skip


def test_a_module_that_stays_python_breaks_a_rule_that_names_it():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.weight if x.sum() > -1e9 else x

    made = nn.Sequential(nn.Linear(4, 4), Loop()).eval()
    for mapping in (QConfigMapping().set_object_type(Loop, q(1)), QConfigMapping().set_module_name("1", q(1))):
        with pytest.raises(qcore.errors.UnsupportedQConfigError, match="Loop at 1 .*it stays Python: it decides by"):
            prepare(mapping.set_module_name("0", q(2)), made, on_unsupported="error")
    plan = qcore.explain(prepare(QConfigMapping().set_global(q(1)), made))
    assert plan.weight_share == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_asked_for_by_name_in_another_dtype_is_refused(dtype):
    made, x = nn.Sequential(nn.Linear(4, 4)).to(dtype).eval(), torch.randn(2, 4, dtype=dtype)
    mapping = QConfigMapping().set_object_type(nn.Linear, q(1))
    with pytest.raises(qcore.errors.UnsupportedQConfigError, match="linear at 0 .*is b?float.*, not float32"):
        qcore.prepare_fx(made, mapping, (x,), backend="reference", on_unsupported="error")


def test_calls_that_were_fused_or_absorbed_can_be_named_by_number():
    made = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout()).eval()
    mapping = QConfigMapping().set_global(q(1))
    for kind in (nn.BatchNorm1d, nn.ReLU, nn.Dropout):
        mapping.set_module_name_object_type_order("", kind, 0, q(2))
    qcore.prepare_fx(made, mapping, (torch.randn(2, 4, 4),), backend="reference")
    mapping.set_module_name_object_type_order("", nn.ReLU, 1, q(2))
    with pytest.raises(ConfigError, match=r"order\('', ReLU, 1\) matches no call; there are 1, counted from 0"):
        qcore.prepare_fx(made, mapping, (torch.randn(2, 4, 4),), backend="reference")


def test_a_clamp_that_is_asked_for_is_not_lost_with_an_operator_that_is_not():
    made = nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 4)).eval()
    mapping = QConfigMapping().set_object_type(nn.ReLU6, q(9)).set_module_name("2", q(1))
    plan = qcore.explain(prepare(mapping, made, on_unsupported="error"))
    assert [(d.operators, d.rule, d.reason) for d in plan.decisions] == [
        (("linear",), "", "no rule asks for it"),
        (("relu6",), "object_type ReLU6", "its input is float, and it only hands on what it gets"),
        (("linear",), "module_name '2'", ""),
    ]  # fmt: skip


def test_a_batch_norm_that_is_asked_for_and_folded_into_what_stays_float_is_refused():
    made = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()

    def prepared(mapping):
        return qcore.prepare_fx(made, mapping, (torch.randn(2, 4, 4),), backend="reference", on_unsupported="error")

    mapping = QConfigMapping().set_object_type(nn.Linear, q(1)).set_object_type(nn.BatchNorm1d, q(2))
    wanted = (
        "BatchNorm1d at 1 .rule object_type BatchNorm1d.: it is folded into conv1d at 0, which stays float: no rule"
    )
    with pytest.raises(qcore.errors.UnsupportedQConfigError, match=wanted):
        prepared(mapping)
    plan = qcore.explain(prepared(mapping.set_object_type(nn.Conv1d, q(3))))
    assert [d.operators for d in plan.quantized] == [("conv1d",), ("linear",)]
