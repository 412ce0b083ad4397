"""Which rule of a QConfigMapping speaks of which operator."""

import operator
import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore import MinMaxObserver, QConfig, QConfigMapping
from qcore.errors import ConfigError
from qcore.fx.resolve import Resolver
from qcore.fx.tracer import trace

WEIGHT = MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)


def q(number):
    """Distinguishable qconfigs."""
    return QConfig(MinMaxObserver.with_args(quant_min=0, quant_max=number), WEIGHT)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.add(self.linear(x), x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = Inner()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        x = self.inner(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return (x + x).relu()


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
