"""Which rule of a mapping speaks of an operator, and which rules speak of nothing."""

import operator

import pytest
import torch
from torch import nn

import qcore
from qcore import QConfigMapping
from qcore.fx.resolve import Resolver
from qcore.fx.tracer import trace
from tests.rules import Inner, Outer, prepare, q


def resolved(mapping, model=None):
    """The rule and the qconfig of each operator, by the name of its node."""
    resolver = Resolver(mapping)
    traced = trace((model or Outer()).eval())
    return {n.name: resolver.resolve(n.meta["origin"]) for n in traced.graph.nodes if "origin" in n.meta}


NAMES = ["first", "inner_linear", "add", "layers_0", "layers_1", "add_1", "clamp"]


def choices(mapping):
    found = resolved(mapping)
    assert list(found) == NAMES
    return [None if r.qconfig is None else r.qconfig.activation().quant_max for r in found.values()]


def test_nothing_asked_for_is_nothing_quantized():
    found = resolved(QConfigMapping())
    assert {(r.rule, r.qconfig) for r in found.values()} == {("", None)}


def test_each_kind_of_rule_wins_over_the_ones_before():
    mapping = QConfigMapping().set_global(q(1))
    assert choices(mapping) == [1, 1, 1, 1, 1, 1, 1]
    mapping.set_object_type(nn.Linear, q(2))
    assert choices(mapping) == [2, 2, 1, 2, 2, 1, 1]
    mapping.set_module_name_regex("inner|layers", q(3))
    assert choices(mapping) == [2, 3, 3, 3, 3, 1, 1]
    mapping.set_module_name("inner", q(4))
    assert choices(mapping) == [2, 4, 4, 3, 3, 1, 1]
    mapping.set_module_name("inner.linear", q(5))
    assert choices(mapping) == [2, 5, 4, 3, 3, 1, 1]
    mapping.set_module_name_object_type_order("layers", nn.Linear, 1, q(6))
    mapping.set_module_name_object_type_order("", torch.relu, 0, q(7))
    assert choices(mapping) == [2, 5, 4, 3, 6, 1, 1]


def test_none_means_float_at_every_level():
    mapping = QConfigMapping().set_global(q(1)).set_object_type(nn.Linear, None).set_module_name("first", q(2))
    assert choices(mapping) == [2, None, 1, None, None, 1, 1]


def test_an_ancestors_name_wins_over_a_regex_that_fits_the_leaf():
    mapping = QConfigMapping().set_module_name_regex(r"inner\.linear", q(1)).set_module_name("inner", q(2))
    assert choices(mapping)[1] == 2


def test_the_first_regex_that_matches_from_the_start_wins():
    mapping = QConfigMapping().set_module_name_regex("lay", q(1)).set_module_name_regex("layers.1", q(2))
    assert choices(mapping)[3:5] == [1, 1]
    assert choices(QConfigMapping().set_module_name_regex("ayers", q(1)))[3:5] == [None, None]


def test_the_class_of_the_containing_module_wins_over_the_function():
    mapping = QConfigMapping().set_object_type(torch.add, None).set_object_type(Inner, q(3))
    found = resolved(mapping)
    assert found["add"].qconfig == q(3)
    assert found["add"].rule == "object_type Inner"


class InPlace(nn.Module):
    def forward(self, x):
        y = x * 2.0
        y += x
        y -= x
        y *= x
        y /= x
        return x + y


@pytest.mark.parametrize(
    ("kind", "inplace", "asked"),
    [
        (operator.add, operator.iadd, {"add", "add_1"}),
        (operator.sub, operator.isub, {"sub"}),
        (operator.mul, operator.imul, {"mul", "mul_1"}),
        (operator.truediv, operator.itruediv, {"truediv"}),
    ],
)
def test_a_rule_for_an_operator_speaks_of_it_in_place_too(kind, inplace, asked):
    for either in (kind, inplace):
        found = resolved(QConfigMapping().set_object_type(either, q(1)), InPlace())
        assert {name for name, r in found.items() if r.qconfig == q(1) and r.is_specific} == asked
    own = resolved(QConfigMapping().set_object_type(kind, q(1)).set_object_type(inplace, None), InPlace())
    assert [r.qconfig for r in own.values() if r.rule == f"object_type {inplace.__name__}"] == [None]


def test_methods_go_by_their_name():
    assert choices(QConfigMapping().set_object_type("relu", q(9)))[-1] == 9


def test_every_call_of_a_module_counts_in_the_module_that_holds_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(x))

    mapping = QConfigMapping().set_module_name_object_type_order("", nn.Linear, 1, q(5))
    assert [r.qconfig for r in resolved(mapping, Twice()).values()] == [None, q(5)]


def test_a_type_that_the_model_lacks_is_named_with_those_that_it_has():
    mapping = QConfigMapping().set_global(q(1)).set_object_type(nn.LSTM, q(2)).set_object_type("cumsum", None)
    with pytest.warns(qcore.errors.QcoreWarning) as warned:
        prepare(mapping)
    (message,) = (str(w.message) for w in warned)
    assert message.startswith(
        "set_object_type(torch.nn.LSTM, ...), set_object_type(the method 'cumsum', ...): the model"
    )
    for there in ("torch.nn.Linear", "torch.add", "operator.add", "the method 'relu'", "tests.rules.Inner"):
        assert there in message
    prepare(mapping, on_unsupported="ignore")  # The suite makes an error of any warning.


def test_a_type_whose_other_form_is_there_is_not_lacking():
    prepare(QConfigMapping().set_global(q(1)).set_object_type(operator.iadd, q(1)))
    every_form = QConfigMapping().set_global(q(1))
    for form in (torch.nn.functional.relu, torch.relu, nn.ReLU, "relu"):
        every_form.set_object_type(form, None)
    prepare(every_form)
    with pytest.warns(qcore.errors.QcoreWarning, match="set_object_type\\(torch.nn.ReLU, ...\\)"):
        prepare(QConfigMapping().set_global(q(1)).set_object_type(nn.ReLU, None))  # It is a method here.


def test_a_backend_s_default_mapping_may_speak_of_types_that_a_model_lacks(installed_backend):
    mapping = qcore.get_default_qconfig_mapping(installed_backend)
    qcore.prepare_fx(Outer().eval(), mapping, (torch.randn(2, 4),))
    mapping.set_object_type(nn.LSTM, None)
    with pytest.warns(qcore.errors.QcoreWarning, match="torch.nn.LSTM"):
        qcore.prepare_fx(Outer().eval(), mapping, (torch.randn(2, 4),))


def test_a_rule_for_a_class_that_only_holds_modules_says_that_it_speaks_of_nothing():
    class Holder(nn.Sequential):
        pass

    made = nn.Sequential(Holder(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)).eval()
    for kind in (Holder, nn.Sequential):
        mapping = QConfigMapping().set_object_type(kind, q(1)).set_module_name("1", q(2))
        with pytest.warns(qcore.errors.QcoreWarning, match=f"{kind.__name__} speaks of the functions .* own forward"):
            prepare(mapping, made)
