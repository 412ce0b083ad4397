"""Each pass has a check after it, which finds a fault; a faulty rewrite of a backend's is taken back, and said."""

import operator
import pickle
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors, ops
from qcore.fx import convert, runs
from qcore.fx import prepare as prepare_module
from qcore.fx.fuse import BATCH_NORM_FUSIONS, FusionPattern
from qcore.fx.graph_module import set_tensor
from qcore.fx.operators import CLAMP, LINEAR
from qcore.fx.shapes import Example, propagate_examples
from qcore.fx.tracer import trace
from qcore.fx.verify import distance, lint


def doubles(module, chain):
    (linear,) = chain
    with module.graph.inserting_after(linear):
        doubled = module.graph.call_function(torch.mul, (linear, 2.0))
    linear.replace_all_uses_with(doubled)
    doubled.args = (linear, 2.0)
    return True


def drops_the_clamp(module, chain):
    chain[1].replace_all_uses_with(chain[0])
    module.graph.erase_node(chain[1])
    return True


def fails(module, chain):
    raise KeyError("weight")


def reads_what_is_not_there(module, chain):
    with module.graph.inserting_before(chain[0]):
        chain[0].args = (module.graph.call_method("nowhere", chain[0].args[:1]), *chain[0].args[1:])
    return True


def negates_twice(module, chain):
    """Right, if roundabout."""
    (linear,) = chain
    with module.graph.inserting_after(linear):
        once = module.graph.call_function(torch.neg, (linear,))
    with module.graph.inserting_after(once):
        twice = module.graph.call_function(torch.neg, (once,))
    linear.replace_all_uses_with(twice)
    once.args = (linear,)
    return True


@pytest.fixture
def prepare(monkeypatch):
    def run(model, x, *rewrites, patterns=((LINEAR,),)):
        own = [FusionPattern(pattern, rewrite) for pattern in patterns for rewrite in rewrites]
        monkeypatch.setattr(qcore.plugins.manager.Backend, "fusion_patterns", lambda self: (*BATCH_NORM_FUSIONS, *own))
        return qcore.prepare_fx(
            model.eval(), qcore.get_default_qconfig_mapping("reference"), x if isinstance(x, tuple) else (x,),
            backend="reference",
        )  # fmt: skip

    return run


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rewrite", "pattern", "reason"),
    [
        (doubles, (LINEAR,), "a result differs by"),
        (drops_the_clamp, (LINEAR, CLAMP), "a result differs by"),
        (reads_what_is_not_there, (LINEAR,), "with it the graph fails: AttributeError"),
    ],
)
def test_a_rewrite_that_changes_the_model_is_taken_back_and_named(prepare, rewrite, pattern, reason):
    torch.manual_seed(0)
    model, x = network(), torch.randn(3, 4)
    prepared = prepare(model, x, rewrite, patterns=[pattern])
    assert torch.allclose(prepared(x), model(x), atol=1e-5)
    (note,) = qcore.explain(prepared).notes
    assert f"{__name__}.{rewrite.__name__} was taken back: {reason}" in note
    assert not any("batch_norm" in str(node.target) for node in prepared.graph.nodes)  # What is right stays.
    assert qcore.explain(qcore.convert_fx(prepared)).notes == (note,)


def test_a_rewrite_that_fails_is_an_error_that_names_the_plugin(prepare):
    with pytest.raises(errors.PluginError, match=r"(?s)rewrite of the fusion pattern .* failed: KeyError"):
        prepare(network(), torch.randn(3, 4), fails, patterns=[(LINEAR,)])


@torch.no_grad()
def test_a_rewrite_that_computes_the_same_stays(prepare):
    model, x = network(), torch.randn(3, 4)
    prepared = prepare(model, x, negates_twice)
    assert [node.target for node in prepared.graph.nodes].count(torch.neg) == 2
    assert qcore.explain(prepared).notes == ()
    assert torch.allclose(prepared(x), model(x), atol=1e-5)


class Draws(nn.Module):
    """Random numbers, integers, booleans and no numbers at all among its results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x) + torch.rand(x.shape[0], 4)
        return y, y.argmax(-1), y > 0, y[:0], (y - y) / (y - y), x.dtype


@torch.no_grad()
def test_results_of_all_kinds_are_compared(prepare):
    prepared = prepare(Draws(), torch.randn(3, 4), negates_twice)
    assert qcore.explain(prepared).notes == ()
    assert [node.target for node in prepared.graph.nodes].count(torch.neg) == 2
    prepared = prepare(Draws(), torch.randn(3, 4), doubles)
    assert "doubles was taken back" in qcore.explain(prepared).notes[0]


def test_what_is_rounding_and_what_is_not():
    x = torch.tensor([1.0, 100.0, float("nan"), float("inf")])
    rounded = x + torch.tensor([9e-3, 0, 0, 0])
    assert distance(x, rounded) == ""
    assert "differs by 0.02" in distance(x, x + torch.tensor([2e-2, 0, 0, 0]))
    assert "infinite or no number" in distance(x, torch.tensor([1.0, 100.0, 3.0, float("inf")]))
    assert "was torch.float32[4]" in distance(x, x.double())
    assert "was torch.float32[4]" in distance(x, x[None])
    assert "built otherwise" in distance((x, x), [x, x])
    assert distance(torch.arange(9), torch.arange(9)) == ""
    assert "11% of a result's integers" in distance(torch.arange(9), torch.arange(9).clamp(1))
    assert distance(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.01], dtype=torch.bfloat16)) == ""
    assert distance((torch.zeros(0), None), (torch.zeros(0), None)) == ""
    assert distance(torch.zeros(2), torch.zeros(2)) == "" and distance(torch.zeros(2), torch.full((2,), 1e-9)) != ""


# What the checks find. A fault is planted in a pass, or in a graph by hand.


def chained(**modules):
    return nn.Sequential(OrderedDict(modules)).eval()


def traced():
    return trace(chained(linear=nn.Linear(4, 4), clamp=nn.ReLU(), last=nn.Linear(4, 2)))


def node_of(module, op, number=0):
    return [node for node in module.graph.nodes if op in (node.op, node.target)][number]


def out_of_order(module):
    node_of(module, torch.clamp).append(node_of(module, F.linear))


def of_another_graph(module):
    node_of(module, torch.clamp).args = (node_of(traced(), F.linear), 0, None)


def erased(module):
    linear = node_of(module, F.linear)
    linear.users.clear()
    module.graph.erase_node(linear)


def unknown_to_its_source(module):
    node_of(module, F.linear).users.clear()


def a_user_that_reads_nothing(module):
    node_of(module, F.linear).users[node_of(module, "output")] = None


def twice_the_name(module):
    node_of(module, torch.clamp).name = node_of(module, F.linear).name


def no_output(module):
    module.graph.erase_node(node_of(module, "output"))


def behind_the_output(module):
    node_of(module, "output").append(module.graph.call_function(torch.zeros, (3,)))


def a_missing_tensor(module):
    node_of(module, "get_attr").target = "linear.nothing"


def a_missing_module(module):
    node_of(module, F.linear).prepend(module.graph.create_node("call_module", "nothing.at.all"))


def no_module(module):
    module.graph.inserting_before(node_of(module, F.linear))
    module.graph.create_node("call_module", "linear.weight")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (out_of_order, "'clamp' reads 'linear', which comes after it"),
        (of_another_graph, "'clamp' reads 'linear', which is of another graph"),
        (erased, "'clamp' reads 'linear', which was erased"),
        (unknown_to_its_source, "'clamp' isn't known to 'linear', which it reads"),
        (a_user_that_reads_nothing, "'linear' has 'output' among its users, which doesn't read it"),
        (twice_the_name, "'linear' has the name of another node"),
        (no_output, "'last' is the last one, and no output"),
        (behind_the_output, "'zeros' comes after the output 'output'"),
        (a_missing_tensor, "refers to 'linear.nothing', which the module doesn't have"),
        (a_missing_module, "'nothing_at_all' refers to 'nothing.at.all', which the module doesn't have"),
        (no_module, "calls 'linear.weight', which is no module"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_is_not_sound_is_found(plant, problem):
    module = traced()
    assert {node.target for node in lint(module, "test")} == {
        "linear.weight",
        "linear.bias",
        "last.weight",
        "last.bias",
    }
    plant(module)
    with pytest.raises(errors.GraphError, match=re.escape(problem)) as info:
        lint(module, "test")
    assert (
        info.value.after == "test" and "after test, node" in str(info.value) and "not of the model" in str(info.value)
    )
    again = pickle.loads(pickle.dumps(info.value))
    assert str(again) == str(info.value) and vars(again) == vars(info.value)


def test_an_empty_graph_is_not_sound():
    with pytest.raises(errors.GraphError, match="node 'output' is the last one, and no output"):
        lint(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), "test")


def shape_changed(module, chain):
    """The same result, by a node that gives another shape than it did."""
    (linear,) = chain
    with module.graph.inserting_before(linear):
        wider = module.graph.call_method("unsqueeze", (linear.args[0], 0))
    with module.graph.inserting_after(linear):
        narrower = module.graph.call_method("squeeze", (linear, 0))
    linear.replace_all_uses_with(narrower)
    narrower.args = (linear, 0)
    linear.args = (wider, *linear.args[1:])
    return True


def put_behind(module, chain):
    chain[0].append(chain[0].args[1])
    return True


def weight_replaced(module, chain):
    set_tensor(module, chain[0].args[1].target, nn.Parameter(torch.zeros(2, 4)))
    return True


def result_claimed(module, chain):
    (linear,) = chain
    with module.graph.inserting_after(linear):
        negated = module.graph.call_function(torch.neg, (linear,))
    linear.replace_all_uses_with(negated)
    negated.args = (linear,)
    negated.meta["example"] = Example((3, 4), torch.float64)
    return True


def result_dropped(module, chain):
    node_of(module, "output").args = (None,)
    return True


@torch.no_grad()
@pytest.mark.parametrize("needs_run", [False, True])
@pytest.mark.parametrize(
    ("rewrite", "problem", "without_a_run"),
    [
        (shape_changed, "node 'linear' gives float32[1, 3, 4], where float32[3, 4] is expected", False),
        (put_behind, "reads 'linear", True),
        (weight_replaced, "gives float32[4, 4], where float32[2, 4] is expected", True),
        (result_claimed, "float64[3, 4]", True),
        (result_dropped, "node 'output' gives None, and gave float32[3, 4] before", True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rewrite_after_which_the_graph_is_not_sound_is_taken_back(
    prepare, needs_run, rewrite, problem, without_a_run, monkeypatch
):
    model, x = chained(linear=nn.Linear(4, 4)), torch.randn(3, 4)
    if not needs_run and not without_a_run:
        pytest.skip("only a run shows it")
    pattern = FusionPattern((LINEAR,), rewrite, needs_run)
    monkeypatch.setattr(qcore.plugins.manager.Backend, "fusion_patterns", lambda self: (pattern,))
    mapping = qcore.get_default_qconfig_mapping("reference")
    prepared = qcore.prepare_fx(model.eval(), mapping, (x,), backend="reference")
    assert torch.equal(prepared(x), model(x))
    (note,) = qcore.explain(prepared).notes
    assert f"{__name__}.{rewrite.__name__} was taken back: node" in note and problem in note


class CalledTwice(nn.Module):
    """With batches of two sizes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        y = self.inner(x)
        return self.inner(x[:2]) if y.sum() < 1e9 else y


@torch.no_grad()
def test_a_part_that_is_called_with_other_sizes_keeps_the_examples_of_its_first_call(prepare):
    model, x = CalledTwice(), torch.randn(3, 4)
    prepared = prepare(model, x, negates_twice)
    assert qcore.explain(prepared).notes == ()
    assert node_of(prepared.inner, F.linear).meta["example"] == Example((3, 4), torch.float32)
    assert torch.allclose(prepared(x), model(x), atol=1e-5)


def block():
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(2, 4, 1), "clamp": nn.ReLU(), "flatten": nn.Flatten(), "linear": nn.Linear(16, 4)}
    return chained(**layers, softmax=nn.Softmax(1))


def prepared_block(qconfig=None):
    mapping = qcore.get_default_qconfig_mapping("reference")
    if qconfig is not None:
        mapping.set_object_type(nn.Linear, qconfig)
    x = torch.randn(3, 2, 2, 2)
    prepared = qcore.prepare_fx(block(), mapping, (x,), backend="reference")
    qcore.calibrate(prepared, [x])
    return prepared


def changed(owner, name, change, monkeypatch):
    """Let a pass's result be changed by ``change(result, *arguments)``."""
    original = getattr(owner, name)

    def run(*args, **kwargs):
        result = original(*args, **kwargs)
        return change(result, *args) or result

    monkeypatch.setattr(owner, name, run)


@pytest.mark.parametrize(
    ("op", "meta", "problem"),
    [
        ("get_attr", {"example": Example((9,), torch.float32)}, "float32[9], where float32[4, 2, 1, 1] is expected"),
        ("get_attr", {}, "gives what has no example, where float32[4, 2, 1, 1] is expected"),
        ("placeholder", {}, "is an input and has no example"),
    ],
)  # fmt: skip
def test_a_fault_of_the_trace_is_found(monkeypatch, op, meta, problem):
    def forget(result, graph, *rest):
        node_of(graph, op).meta = meta

    changed(runs, "propagate_examples", forget, monkeypatch)
    with pytest.raises(errors.GraphError, match=rf"after trace, node .*{re.escape(problem)}"):
        prepared_block()


def first(entries, **changes):
    return (replace(entries[0], **changes), *entries[1:])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: {"decisions": first(p.decisions, node="gone")}, "isn't in the graph, and the plan has a decision"),
        (lambda p: {"decisions": first(p.decisions, nodes=("gone",))}, "isn't in the graph"),
        (lambda p: {"observations": first(p.observations, value="gone")}, "the plan has an observation for it"),
        (lambda p: {"observations": first(p.observations, readers=("gone",))}, "the plan has an observation for it"),
        (lambda p: {"observations": first(p.observations, qparams=99)}, "'input_1' is to have qparams 99, of"),
        (lambda p: {"observations": p.observations[:1]}, "'clamp' is to give integers, and has no qparams"),
        (lambda p: {"weights": first(p.weights, node="gone")}, "the plan has a weight for it"),
        (lambda p: {"weights": first(p.weights, argument=0)}, "has no weight as its argument 0"),
        (lambda p: {"shared": {"gone": 0}}, "the plan has shared qparams for it"),
        (lambda p: {"absorbed": {"clamp": "gone"}}, "the plan has an absorbed clamp for it"),
        (lambda p: {"dynamic": {"gone": (0, 255)}}, "the plan has qparams at run time for it"),
    ],
)
def test_a_fault_of_the_plan_is_found(monkeypatch, change, problem):
    changed(prepare_module, "make_plan", lambda made, *_: (replace(made[0], **change(made[0])), made[1]), monkeypatch)
    with pytest.raises(errors.GraphError, match=rf"after plan, node .*{re.escape(problem)}"):
        prepared_block()


def observer_dropped(names, graph, *_):
    observer = node_of(graph, names[1])
    observer.replace_all_uses_with(observer.args[0])
    graph.graph.erase_node(observer)


def observer_passed_by(names, graph, *_):
    observer = node_of(graph, names[0])
    (reader,) = observer.users
    reader.replace_input_with(observer, observer.args[0])


def observer_too_many(names, graph, *_):
    node = node_of(graph, torch.flatten)
    with graph.graph.inserting_after(node):
        graph.graph.call_module(names[0], (node,)).meta["example"] = node.meta["example"]


def observer_of_another_shape(names, graph, *_):
    node_of(graph, names[0]).meta["example"] = Example((3,), torch.float32)


def no_observer(names, graph, *_):
    graph.add_module(names[0], nn.Identity())


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (observer_dropped, "'clamp' has no observer for qparams 1"),
        (observer_passed_by, "'conv' doesn't read 'input_1' by its observer 'activation_post_process_0'"),
        (observer_too_many, "'flatten' has an observer for qparams 0 that nobody planned"),
        (observer_of_another_shape, "gives float32[3], where float32[3, 2, 2, 2] is expected"),
        (no_observer, "calls 'activation_post_process_0', which is no observer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_observing_is_found(monkeypatch, fault, problem):
    changed(prepare_module, "observe", fault, monkeypatch)
    with pytest.raises(errors.GraphError, match=rf"after observe, node .*{re.escape(problem)}"):
        prepared_block()


def bypassed(graph, node, value):
    node.replace_all_uses_with(value)
    graph.graph.eliminate_dead_code()


def not_quantized(graph, _):
    bypassed(graph, node_of(graph, ops.dequantize_per_tensor, 1), node_of(graph, torch.clamp))


def read_as_float(graph, _):
    flatten, clamp = node_of(graph, torch.flatten), node_of(graph, torch.clamp)
    with graph.graph.inserting_before(flatten):
        graph.graph.call_function(operator.add, (flatten.args[0], clamp))
    flatten.args = (clamp, *flatten.args[1:])


def observer_left(graph, conversion):
    with graph.graph.inserting_before(node_of(graph, ops.quantize_per_tensor)):
        graph.graph.call_module(conversion.record.observers[0], (node_of(graph, "placeholder"),))


def float_weight(graph, conversion):
    conv = node_of(graph, torch.conv2d)
    set_tensor(graph, "other", torch.zeros(4, 2, 1, 1))
    with graph.graph.inserting_before(conv):
        node = graph.graph.get_attr("other")
    node.meta["example"] = Example((4, 2, 1, 1), torch.float32)
    conv.args = (conv.args[0], node, *conv.args[2:])


def weight_of_another_shape(graph, conversion):
    values = node_of(graph, torch.conv2d).args[1].args[0]
    set_tensor(graph, values.target, torch.zeros(4, 1, 1, 1, dtype=torch.int8))
    for node in (values, *values.users):
        node.meta["example"] = Example((4, 1, 1, 1), node.meta["example"].dtype)


def bias_of_another_shape(graph, conversion):
    set_tensor(graph, node_of(graph, torch.conv2d).args[2].target, torch.zeros(1))


def quantize_of_another_dtype(graph, conversion):
    quantize = node_of(graph, ops.quantize_per_tensor)
    quantize.args = (*quantize.args[:5], torch.int8)


def dequantize_of_another_shape(graph, conversion):
    node_of(graph, ops.dequantize_per_tensor).meta["example"] = Example((1,), torch.float32)


def integers_without_example(graph, conversion):
    del node_of(graph, torch.conv2d).args[1].args[0].meta["example"]


def other_operator(graph, conversion):
    node_of(graph, torch.clamp).target = torch.clip


def operator_dropped(graph, conversion):
    clamp = node_of(graph, torch.clamp)
    clamp.replace_all_uses_with(clamp.args[0])
    graph.graph.erase_node(clamp)


def example_changed(graph, conversion):
    node_of(graph, torch.conv2d).meta["example"] = Example((3, 4, 2, 2), torch.float64)


def not_rounded_at_run_time(graph, conversion):
    rounded = node_of(graph, ops.dynamic_quantize_dequantize)
    bypassed(graph, rounded, rounded.args[0])


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (not_quantized, "'clamp' isn't quantized, as planned"),
        (read_as_float, "'flatten' reads 'clamp' as float, and not as integers, as planned"),
        (observer_left, "is an observer, which isn't needed any more"),
        (float_weight, "'conv' reads no integers as its argument 1"),
        (weight_of_another_shape, "'conv' has a weight of int8[4, 1, 1, 1], and had one of [4, 2, 1, 1]"),
        (bias_of_another_shape, "gives float32[4], where float32[1] is expected"),
        (quantize_of_another_dtype, "gives uint8[3, 2, 2, 2], where int8[3, 2, 2, 2] is expected"),
        (dequantize_of_another_shape, "gives float32[1], where float32[3, 2, 2, 2] is expected"),
        (integers_without_example, "gives what has no example, where int8[4, 2, 1, 1] is expected"),
        (other_operator, "'clamp' is call_function"),
        (operator_dropped, "'clamp' is gone, and others read it"),
        (example_changed, "'conv' gives float64[3, 4, 2, 2], where float32[3, 4, 2, 2] is expected"),
        (not_rounded_at_run_time, "'linear' reads what isn't quantized at run time"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_converting_is_found(monkeypatch, fault, problem):
    prepared = prepared_block(qcore.qconfig.default_dynamic_qconfig if fault is not_rounded_at_run_time else None)
    qcore.convert_to_reference_fx(prepared)
    changed(convert._Conversion, "run", fault, monkeypatch)
    with pytest.raises(errors.GraphError, match=rf"after convert, node .*{re.escape(problem)}"):
        qcore.convert_to_reference_fx(prepared)


def test_what_a_user_changes_in_a_prepared_model_is_no_fault_of_converting():
    """Another weight, a reader more, a node in between."""
    prepared = prepared_block()
    linear, observer = node_of(prepared, F.linear), node_of(prepared, "activation_post_process_1")
    set_tensor(prepared, "linear.weight", nn.Parameter(torch.randn(4, 16, dtype=torch.float32)[:3]))
    set_tensor(prepared, "linear.bias", nn.Parameter(torch.randn(3)))
    with prepared.graph.inserting_before(observer):
        between = prepared.graph.call_function(torch.neg, (observer.args[0],))
    with prepared.graph.inserting_after(linear):
        prepared.graph.call_function(torch.neg, (linear,))
    observer.args = (between,)
    prepared.recompile()
    x = torch.randn(3, 2, 2, 2)
    qcore.calibrate(prepared, [x])
    assert qcore.convert_to_reference_fx(prepared)(x).shape == (3, 3)


@torch.no_grad()
@pytest.mark.parametrize("qconfig", [None, "default_dynamic_qconfig", "default_weight_only_qconfig"])
def test_the_examples_of_every_stage_are_what_a_run_finds(qconfig):
    prepared = prepared_block(qconfig and getattr(qcore.qconfig, qconfig))
    for module in (prepared, qcore.convert_to_reference_fx(prepared)):
        noted = {node: node.meta.get("example") for node in module.graph.nodes}
        propagate_examples(module, [torch.randn(3, 2, 2, 2)])
        assert noted == {node: node.meta.get("example") for node in module.graph.nodes}
        assert all(noted[node] for node in noted if node.op != "output")


def test_fuse_fx_lints_what_a_backend_makes(monkeypatch):
    pattern = FusionPattern((LINEAR,), put_behind)
    monkeypatch.setattr(qcore.plugins.manager.Backend, "fusion_patterns", lambda self: (pattern,))
    with pytest.raises(errors.GraphError, match="after fuse, node"):
        qcore.fuse_fx(network().eval(), backend="reference")
