"""QConfigMapping: for each operator the same rule wins as in torch.ao, whatever the mapping says.

Development only: of the whole project, only the tests in this directory may import torch.ao.quantization.
"""

import pytest
import small_models as models
import torch
import torch.ao.quantization as ao
import torch.ao.quantization.quantize_fx  # The package does not load it by itself.
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.ao.quantization.fx.qconfig_mapping_utils import _generate_node_name_to_qconfig
from torch.ao.quantization.fx.tracer import QuantizationTracer

import qcore
from qcore.fx.resolve import Resolver
from qcore.fx.tracer import trace

#: Qconfigs that are told apart by the largest integer of their activations; None means float.
TELLTALES = [None, 101, 102, 103, 104]


def qconfig(package, telltale):
    if telltale is None:
        return None
    observer = ao.MinMaxObserver if package is ao else qcore.MinMaxObserver
    constructor = observer.with_args(quant_min=0, quant_max=telltale)
    return package.QConfig(activation=constructor, weight=constructor)


def telltale(qconfig):
    return None if qconfig is None else qconfig.activation().quant_max


def mapping(package, rules):
    made = package.QConfigMapping()
    for setter, *arguments, choice in rules:
        getattr(made, setter)(*arguments, qconfig(package, choice))
    return made


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1 = nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.stage = models.Stage(8)

    def forward(self, x):
        y = torch.add(self.act(self.lin1(x)), x).flatten(1)
        y = F.relu(self.act(y)).relu()
        return self.stage(torch.add(y, self.lin1(y)) * y)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = models.Stage(8)
        self.seq = nn.Sequential(nn.Linear(8, 8), models.Block(8), nn.Linear(8, 8))
        self.tail = Tail()
        self.stage1 = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        y = torch.add(self.stage(x), F.relu(x))
        y = self.seq(y) * self.tail(y).relu()
        return F.relu(torch.add(self.stage1(y), y)).flatten(1)


MODEL = Model().eval()
PATHS = [path for path, _ in MODEL.named_modules() if path]
REGEXES = ["stage", "stage$", r".*lin1", r"tail\..*", r".*\.block\.lin\d", "seq.1", "", r"tail", r".*act", "stage1?"]
TYPES = [
    nn.Linear, nn.ReLU, models.Block, models.Stage, Tail, Model, nn.Sequential,
    torch.add, F.relu, F.hardswish, "relu", "flatten",
]  # fmt: skip
OWNERS = ["", "stage", "stage.block", "seq", "seq.1", "tail", "tail.stage.other", "stage1"]
ORDERED = [nn.Linear, nn.ReLU, torch.add, F.relu]
CHOICE = st.sampled_from(TELLTALES)
RULES = st.one_of(
    st.tuples(st.just("set_global"), CHOICE),
    st.tuples(st.just("set_object_type"), st.sampled_from(TYPES), CHOICE),
    st.tuples(st.just("set_module_name_regex"), st.sampled_from(REGEXES), CHOICE),
    st.tuples(st.just("set_module_name"), st.sampled_from(PATHS), CHOICE),
    st.tuples(
        st.just("set_module_name_object_type_order"),
        st.sampled_from(OWNERS), st.sampled_from(ORDERED), st.integers(0, 2), CHOICE,
    ),
)  # fmt: skip


def traced_by_both(model):
    tracer = QuantizationTracer([], [])
    theirs = fx.GraphModule(model, tracer.trace(model))
    return theirs, tracer.node_name_to_scope, trace(model)


def is_operator(node):
    return node.op in ("call_module", "call_function", "call_method")


def chosen(traced, rules):
    """What each side chooses for each operator, in the order of execution."""
    theirs, scopes, ours = traced
    modules = dict(theirs.named_modules(remove_duplicate=False))
    found = _generate_node_name_to_qconfig(theirs, modules, theirs.graph, mapping(ao, rules), scopes)
    expected = [(node.name, telltale(found[node.name])) for node in theirs.graph.nodes if is_operator(node)]
    resolver = Resolver(mapping(qcore, rules))
    origins = [node.meta["origin"] for node in ours.graph.nodes if is_operator(node)]
    assert len(origins) == len(expected)
    return expected, [
        (name, telltale(resolver.resolve(origin).qconfig)) for (name, _), origin in zip(expected, origins, strict=True)
    ]


@pytest.fixture(scope="module")
def traced():
    return traced_by_both(MODEL)


@settings(max_examples=400, deadline=None)
@given(rules=st.lists(RULES, min_size=1, max_size=12))
def test_the_same_rule_wins(traced, rules):
    expected, found = chosen(traced, rules)
    assert found == expected


@pytest.mark.parametrize("choice", [None, 101])
def test_an_empty_module_name_is_no_ancestor(traced, choice):
    expected, found = chosen(traced, [("set_global", 102), ("set_module_name", "", choice)])
    assert found == expected
    assert {name for _, name in found} == {102}


class FromList(nn.Module):
    """Calls modules that another module holds, which is never called itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Reaching(nn.Module):
    """Calls a module inside another one."""

    def __init__(self):
        super().__init__()
        self.block = models.Block(8)

    def forward(self, x):
        return self.block.lin1(self.block(x))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("owner", ["", "layers"])
def test_order_counts_within_the_module_that_holds_the_called_one(owner, index):
    rules = [("set_global", 101), ("set_module_name_object_type_order", owner, nn.Linear, index, 102)]
    expected, found = chosen(traced_by_both(FromList().eval()), rules)
    assert found == expected


@pytest.mark.parametrize("index", [0, 1, 2])
def test_order_counts_calls_from_elsewhere(index):
    rules = [("set_global", 101), ("set_module_name_object_type_order", "block", nn.Linear, index, 102)]
    expected, found = chosen(traced_by_both(Reaching().eval()), rules)
    assert found == expected


def test_departure_order_counts_method_calls_too(traced):
    expected, found = chosen(traced, [("set_global", 101), ("set_module_name_object_type_order", "", "relu", 0, 102)])
    assert 102 not in [choice for _, choice in expected]
    assert [choice for _, choice in found].count(102) == 1


def test_departure_order_counts_operators_as_written():
    """torch.ao counts after fusion, so an operator that was fused away no longer counts."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()).eval()
    example = (torch.randn(2, 8),)
    rules = [("set_global", 101), ("set_module_name_object_type_order", "", nn.ReLU, 0, None)]
    prepared = qcore.prepare_fx(model, mapping(qcore, rules), example, backend="reference")
    floats = {decision.path for decision in qcore.explain(prepared).floating}
    assert "1" in floats
    theirs = ao.quantize_fx.prepare_fx(model, mapping(ao, rules), example)
    # The first ReLU is fused into the linear all the same, and "number 0" is the last one.
    assert not any(node.target == "1" for node in theirs.graph.nodes)
    assert theirs.get_submodule("4").qconfig is None
