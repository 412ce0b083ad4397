"""The pass that carries out the plan: an observer is as planned, and only the readers that are named read it."""

from functools import partial

import pytest
import torch
from torch import nn

from qcore import FixedQParamsObserver, HistogramObserver, MinMaxObserver
from qcore.fx.observe import make_observer, observe, observer_nodes
from qcore.fx.shapes import propagate_examples
from qcore.fx.tracer import trace
from qcore.qconfig import observer_traits
from qcore.quantization_plan import Observation, QParamsSpec, QuantizationPlan


def spec(constructor, low=0, high=255, **more):
    return QParamsSpec(constructor, observer_traits(constructor), low, high, **more)


@pytest.mark.parametrize(
    ("constructor", "range_"),
    [
        (MinMaxObserver, (0, 15)),
        (MinMaxObserver.with_args(), (0, 15)),
        (MinMaxObserver.with_args(quant_min=0, quant_max=127), (0, 127)),  # The user chose.
        (partial(MinMaxObserver), (0, 255)),  # It can't be told anything.
    ],
)
def test_a_range_that_was_left_open_is_the_plan_s(constructor, range_):
    observer = make_observer(spec(constructor, 0, 15), {})
    assert (observer.quant_min, observer.quant_max) == range_


def test_the_smallest_scale_is_the_user_s_or_else_the_kernel_s():
    assert make_observer(spec(MinMaxObserver, eps=0.5), {}).eps == 0.5
    assert make_observer(spec(MinMaxObserver.with_args(eps=0.75), eps=0.5), {}).eps == 0.75


def test_fixed_qparams_go_before_all_else():
    observer = make_observer(spec(HistogramObserver, fixed=(1 / 256, 3)), {HistogramObserver: MinMaxObserver})
    assert type(observer) is FixedQParamsObserver
    assert (observer.scale, observer.zero_point) == (1 / 256, 3)


def test_a_stand_in_keeps_the_arguments():
    class Own(HistogramObserver):
        pass

    observer = make_observer(spec(HistogramObserver.with_args(bins=64)), {HistogramObserver: Own})
    assert type(observer) is Own and observer.bins == 64
    assert type(make_observer(spec(MinMaxObserver), {HistogramObserver: Own})) is MinMaxObserver


#: A name that qcore would like to have: the user's layer has it, and so does the node.
LINEAR = "activation_post_process_0"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation_post_process_0 = nn.Linear(4, 4)

    def forward(self, x):
        y = self.activation_post_process_0(x)
        return y.exp() + y.sin(), y.cos()


def observed(*observations, qparams=1):
    module = trace(Net().eval())
    propagate_examples(module, (torch.randn(2, 4),))
    plan = QuantizationPlan("b", (), qparams=(spec(MinMaxObserver),) * qparams, observations=observations)
    names = observe(module, plan, {})
    module.graph.lint()
    return module, names


def sources(module):
    """What each node of Python's or torch's reads."""
    return {
        node.name: [source.name for source in node.all_input_nodes]
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method", "output")
    }


def test_only_the_readers_that_are_named_read_the_observer():
    module, names = observed(Observation(LINEAR, 0, ("sin", "cos")))
    name = names[0]
    assert name != LINEAR and type(module.get_submodule(name)) is MinMaxObserver
    read = sources(module)
    (observer,) = (node.name for node in module.graph.nodes if node.target == name)
    assert read["exp"] == [LINEAR] and read["sin"] == read["cos"] == [observer]


def test_without_names_all_read_it_and_it_sees_the_value():
    module, names = observed(Observation(LINEAR, 0, None))
    read = sources(module)
    assert read["exp"] == read["sin"] == read["cos"] != [LINEAR]
    x = torch.randn(3, 4)
    module(x)
    y = module.activation_post_process_0.weight @ x.T
    largest = (y + module.activation_post_process_0.bias[:, None]).max()
    assert torch.allclose(module.get_submodule(names[0]).max_val, largest)


def test_one_set_of_qparams_at_several_places_is_one_observer():
    module, names = observed(
        Observation("x", 0, None), Observation(LINEAR, 1, None), Observation("exp", 0, None), qparams=2
    )
    found = [(node.args[0].name, number) for node, number in observer_nodes(module, names)]
    assert found == [("x", 0), (LINEAR, 1), ("exp", 0)]
    assert len(names) == 2 and len(set(names.values())) == 2
    assert sum(isinstance(m, MinMaxObserver) for m in module.modules()) == 2
