"""Where observers stand: the same values as in torch.ao, but for the departures that are written down here.

Development only: of the whole project, only the tests in this directory may import torch.ao.quantization.
"""

import both_sides as sides
import pytest
import small_models as models
import torch
import torch.ao.quantization as ao
import torch.nn.functional as F
from both_sides import MIN_MAX, PER_TENSOR
from small_models import IMAGE, ROWS, Call, conv
from torch import nn

import qcore

ALIKE = {
    "conv_bn_relu": (models.conv_bn_relu, IMAGE, 4),
    "depthwise": (models.depthwise, IMAGE, 4),
    "conv_transpose": (models.conv_transpose, IMAGE, 3),
    "conv1d": (models.conv1d, (2, 3, 9), 3),
    "linear_relu": (models.linear_relu, ROWS, 3),
    "residual": (models.residual, IMAGE, 5),
    "residual_relu_module": (models.residual_relu_module, IMAGE, 5),
    "functional_chain": (models.functional_chain, IMAGE, 3),
    "called_twice": (models.called_twice, ROWS, 5),
    "multiplied": (models.multiplied, IMAGE, 4),
    "hardswish": (models.hardswish, IMAGE, 5),
    "functional_hardswish": (models.functional_hardswish, IMAGE, 3),
    "leaky": (models.leaky, IMAGE, 5),
    "gated": (models.gated, IMAGE, 6),
    "fixed_chain": (models.fixed_chain, ROWS, 6),
    "float_island": (models.float_island, ROWS, 4),
    "functional_island": (models.functional_island, ROWS, 4),
    "matmul": (models.matmul, (2, 4, 8), 4),
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_values_are_observed(name):
    make, shape, count = ALIKE[name]
    # torch.ao takes no weights per channel for transposed convolutions.
    rules = [("set_global", PER_TENSOR if name == "conv_transpose" else MIN_MAX)]
    theirs, ours = sides.prepare_both(make(), (torch.randn(shape),), rules)
    placement = sides.our_placement(ours)
    assert placement == sides.their_placement(theirs)
    assert len(placement) == count


RULES = {
    "module_name": [("set_module_name", "stage", MIN_MAX)],
    "module_name_none": [("set_global", MIN_MAX), ("set_module_name", "stage", None)],
    "nearest_ancestor": [
        ("set_global", MIN_MAX),
        ("set_module_name", "stage", None),
        ("set_module_name", "stage.block", MIN_MAX),
    ],
    "leaf": [("set_module_name", "stage.block.lin2", MIN_MAX)],
    "regex": [("set_module_name_regex", r"stage\d?\.block.*", MIN_MAX)],
    "regex_is_a_prefix": [("set_module_name_regex", "stage", MIN_MAX)],
    "regex_loses_to_an_ancestor": [
        ("set_module_name_regex", r".*lin1", MIN_MAX),
        ("set_module_name", "stage", None),
    ],
    "object_type": [("set_global", MIN_MAX), ("set_object_type", torch.add, None)],
    "containing_module_type": [
        ("set_object_type", torch.add, None),
        ("set_object_type", models.Block, MIN_MAX),
        ("set_object_type", nn.Linear, MIN_MAX),
        ("set_object_type", nn.ReLU, MIN_MAX),
    ],
    "order": [("set_global", MIN_MAX), ("set_module_name_object_type_order", "", torch.add, 0, None)],
    "order_of_a_module": [
        ("set_global", MIN_MAX),
        ("set_module_name_object_type_order", "stage.block", nn.Linear, 1, None),
    ],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_same_values_are_observed_under_rules(rules):
    theirs, ours = sides.prepare_both(models.Nested(), (torch.randn(ROWS),), rules)
    placement = sides.our_placement(ours)
    expected = sides.their_placement(theirs)
    # torch.ao quantizes a sum of floats; qcore doesn't, as nothing is saved by it.
    kept_float = [decision.path for decision in qcore.explain(ours).floating if "save a conversion" in decision.reason]
    for found in (placement, expected):
        for name in [name for name in found if any(name.startswith(path or ":") for path in kept_float)]:
            del found[name]
    assert placement == expected
    assert placement


def own(*names):
    """Values with an observer each."""
    return {name: name for name in names}


def cat():
    return Call(
        lambda m, x: m.last(torch.cat([m.first(x), m.second(x)], 1)), first=conv(), second=conv(), last=conv(8, 4)
    )


#: Model, input, what torch.ao observes, what qcore observes.
DEPARTURES = {
    # (a) A clamp behind a weighted operator: torch.ao observes before it and again, with the same observer, after it;
    # qcore only after it, since a quantize that saturates there is the clamp.
    "clamp_relu6": (
        lambda: nn.Sequential(conv(), nn.ReLU6(), conv(4, 4)), IMAGE,
        {**own("input input", "0", "2"), "1": "0"}, own("input input", "1", "2"),
    ),
    "clamp_hardtanh": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Hardtanh(), nn.Linear(6, 4)), ROWS,
        {**own("input input", "0", "2"), "1": "0"}, own("input input", "1", "2"),
    ),
    "clamp_functional": (
        lambda: Call(lambda m, x: m.last(F.relu6(m.first(x))), first=conv(), last=conv(4, 4)), IMAGE,
        {**own("input x", "first", "last"), ":relu6": "first"}, own("input x", ":relu6", "last"),
    ),
    "clamp_method": (
        lambda: Call(lambda m, x: m.last(m.first(x).clamp(-1, 1)), first=conv(), last=conv(4, 4)), IMAGE,
        {**own("input x", "first", "last"), ":clamp": "first"}, own("input x", ":clamp", "last"),
    ),
    # (b) An average gets its own observer: its range is narrower than its input's.
    "adaptive_avg_pool": (
        lambda: Call(
            lambda m, x: m.last(torch.flatten(m.pool(m.first(x)), 1)),
            first=conv(), pool=nn.AdaptiveAvgPool2d(1), last=nn.Linear(4, 5),
        ), IMAGE,
        {**own("input x", "first", "last"), "pool": "first", ":flatten": "first"},
        own("input x", "first", "pool", "last"),
    ),
    "avg_pool": (
        lambda: nn.Sequential(conv(), nn.AvgPool2d(2), conv(4, 4)), IMAGE,
        {**own("input input", "0", "2"), "1": "0"}, own("input input", "0", "1", "2"),
    ),
    "mean": (
        lambda: Call(lambda m, x: m.last(m.first(x).mean((2, 3))), first=conv(), last=nn.Linear(4, 5)), IMAGE,
        {**own("input x", "first", "last"), ":mean": "first"}, own("input x", "first", ":mean", "last"),
    ),
    # (c) What only moves data isn't observed again: torch.ao calls the input's observer a second time.
    "max_pool": (
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2), conv(4, 4)), IMAGE,
        {**own("input input", "0", "2"), "1": "0"}, own("input input", "0", "2"),
    ),
    "cat": (
        cat, IMAGE,
        {**own("input x", "first", "last"), "second": "first", ":cat": "first"},
        {**own("input x", "first", "last"), "second": "first"},
    ),
    "view": (
        lambda: Call(lambda m, x: m.last(m.first(x).view(2, -1)), first=conv(), last=nn.Linear(256, 5)), IMAGE,
        {**own("input x", "first", "last"), ":view": "first"}, own("input x", "first", "last"),
    ),
    "relu_of_a_value_with_other_readers": (
        lambda: Call(lambda m, x: (lambda y: F.relu(y) + y)(m.first(x)), first=conv()), IMAGE,
        {**own("input x", "first", ":add"), ":relu": "first"}, own("input x", "first", ":add"),
    ),
    # (d) An operator that only hands on float input stays float; the quantize moves behind it.
    "max_pool_of_float": (
        lambda: nn.Sequential(nn.MaxPool2d(2), conv()), IMAGE,
        {**own("input input", "1"), "0": "input input"}, own("0", "1"),
    ),
    # (e) nn.Flatten and the like have patterns in qcore and none in torch.ao, which therefore goes to float and back
    # and observes the flattened value anew.
    "flatten_module": (
        lambda: nn.Sequential(conv(), nn.Flatten(), nn.Linear(256, 5)), IMAGE,
        own("input input", "0", "1", "2"), own("input input", "0", "2"),
    ),
    # (f) Dropout in evaluation mode is nothing; torch.ao gives its output an observer of its own.
    "dropout": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 4)), ROWS,
        own("input input", "0", "1", "2"), own("input input", "0", "2"),
    ),
    "identity": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Identity(), nn.Linear(6, 4)), ROWS,
        {**own("input input", "0", "2"), "1": "0"}, own("input input", "0", "2"),
    ),
    # (g) A sum with a number has a range of its own; torch.ao shares the input's observer with it.
    "add_number": (
        lambda: Call(lambda m, x: m.last(m.first(x) + 1.0), first=conv(), last=conv(4, 4)), IMAGE,
        {**own("input x", "first", "last"), ":add": "first"}, own("input x", "first", ":add", "last"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPARTURES)
def test_a_departure_is_just_this(name):
    make, shape, expected_of_them, expected_of_us = DEPARTURES[name]
    theirs, ours = sides.prepare_both(make(), (torch.randn(shape),))
    assert sides.their_placement(theirs) == expected_of_them
    assert sides.our_placement(ours) == expected_of_us


def test_fixed_qparams_come_from_the_backend_and_need_no_rule():
    theirs, ours = sides.prepare_both(models.gated(), (torch.randn(IMAGE),), fixed=False)
    assert "gate" in sides.our_placement(ours)
    kinds = [type(module) for module in ours.modules() if isinstance(module, qcore.ObserverBase)]
    assert kinds.count(qcore.FixedQParamsObserver) == 1
    # torch.ao drops the qconfig of the sigmoid; its output is observed as the multiplication's input.
    assert not any(isinstance(module, ao.FixedQParamsObserver) for module in theirs.modules())


@pytest.mark.parametrize("recipe", [MIN_MAX, PER_TENSOR], ids=["per_channel", "per_tensor"])
def test_the_same_weights_are_quantized(recipe):
    theirs, ours = sides.prepare_both(models.Nested(), (torch.randn(ROWS),), [("set_global", recipe)])
    x = torch.randn(16, 8)
    assert torch.equal(theirs(x), ours(x))
    theirs, ours = sides.convert_both(theirs, ours)
    assert sides.their_weights(theirs).keys() == sides.our_weights(ours).keys()
    assert len(sides.our_weights(ours)) == 1 + 5 + 5 + 3
