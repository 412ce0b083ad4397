"""The signatures that do more than put arguments in order: a use without a normal form stays as it is."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qcore
from qcore.fx import forms
from tests.models import prepared_for


class Convolves(nn.Module):
    """Functional convolutions of every rank, with words for padding, without bias, without a batch."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4, *[3] * n)) for n in (1, 2, 3)])

    def forward(self, x):
        for n, weight in enumerate(self.weights):
            x = (F.conv1d, F.conv2d, F.conv3d)[n](x, weight, padding="same", stride=1)
            x = F.relu(x).unsqueeze(-1)
        return x


@torch.no_grad()
def test_functional_convolutions_with_words_for_padding(installed_backend):
    torch.manual_seed(0)
    model, x = Convolves(), torch.randn(4, 9)
    prepared = prepared_for(model, (x,), backend=installed_backend)
    for _ in range(3):
        prepared(torch.randn(4, 9))
    prepared(x)
    plan = qcore.explain(prepared)
    assert [d.operators[0] for d in plan.quantized if d.weights] == ["conv1d", "conv2d", "conv3d"]
    expected = model(x)
    assert (qcore.convert_fx(prepared)(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (forms.conv(2, "x", "w"), ("x", "w", None, (1, 1), (0, 0), (1, 1), 1)),
        (forms.conv(1, "x", "w", "b", [2], "same", 3, 4), ("x", "w", "b", [2], "same", (3,), 4)),
        (forms.conv(2, "x", "w", padding_mode="circular"), None),
        (
            forms.conv_transpose(2, "x", "w", "b", 2, 1, (1, 0), 4, 3),
            ("x", "w", "b", (2, 2), (1, 1), (1, 0), 4, (3, 3)),
        ),
        (forms.batch_norm("x", "m", "v", momentum=None), ("x", "m", "v", None, None, False, 0.1, 1e-5)),
        (forms.batch_norm("x", "m", "v", training=True), None),
        (forms.batch_norm("x", None, None), None),
        (forms.clamp("x", max=1), ("x", None, 1)),
        (forms.clamp("x"), None),
        (forms.clamp("x", True), None),
        (forms.clamp("x", torch.tensor(0.0)), None),
        (forms.binary("x", "y"), ("x", "y")),
        (forms.binary("x", "y", alpha=2), None),
        (forms.joined(("x", "y"), 1), (["x", "y"], 1)),
        (forms.joined("xy"), None),
        (forms.max_pool(2, "x", 3, ceil_mode=True), ("x", (3, 3), (3, 3), (0, 0), (1, 1), True)),
        (forms.max_pool(1, "x", (3,), [], 1), ("x", (3,), (3,), (1,), (1,), False)),
        (forms.max_pool(2, "x", 3, return_indices=True), None),
        (forms.avg_pool(1, "x", 2, 1), ("x", (2,), (1,), (0,), False, True)),
        (forms.avg_pool(2, "x", 2, divisor_override=3), ("x", (2, 2), (2, 2), (0, 0), False, True, 3)),
        (forms.adaptive_avg_pool(2, "x", 1), ("x", (1, 1))),
        (forms.adaptive_avg_pool(2, "x", (None, 2)), ("x", (None, 2))),
        (forms.mean("x", -1), ("x", (-1,), False)),
        (forms.mean("x", [1, 2], True), ("x", (1, 2), True)),
        (forms.mean("x"), None),
        (forms.mean("x", 1, dtype=torch.float64), None),
        (forms.softmax("x", 1), ("x", 1)),
        (forms.softmax("x"), None),
        (forms.softmax("x", 1, torch.float64), None),
        (forms.gelu("x"), ("x",)),
        (forms.gelu("x", "tanh"), None),
        (forms.interpolate("x", None, 2, "bicubic", True), ("x", None, 2, "bicubic", True)),
        (forms.interpolate("x", 3, antialias=True), None),
        (forms.interpolate("x", None, 2, recompute_scale_factor=True), None),
        (forms.pad("x", [1, 2]), ("x", (1, 2), "constant", None)),
        (forms.pad("x", (1, 2), "constant", 1.0), None),
        (forms.pad("x", (1, 2), "reflect"), ("x", (1, 2), "reflect", None)),
        (forms.sizes("x", 2, -1), ("x", (2, -1))),
        (forms.sizes("x", [2, -1]), ("x", (2, -1))),
        (forms.sizes("x", -1), ("x", (-1,))),
        (forms.sizes("x", torch.int8), None),
        (forms.dropout("x", 0.5, False), ("x",)),
        (forms.dropout("x"), None),
    ],
)
def test_the_arguments_of_the_normal_form(found, wanted):
    assert found == wanted


def test_a_size_among_sizes_is_told_from_a_whole_shape():
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = (
        graph.call_method("size", (x, 0)),
        graph.call_method("size", (x,), {"dim": 0}),
        graph.call_method("numel", (x,)),
    )
    whole = (graph.call_method("size", (x,)), graph.call_function(getattr, (x, "shape")))
    assert all(forms.sizes("x", node) == ("x", (node,)) for node in one)
    assert all(forms.sizes("x", node) == ("x", node) for node in whole)


CALLS = {
    "max_pool": (F.max_pool2d, partial(forms.max_pool, 2), (3,), {"stride": 2, "padding": 1, "dilation": 1}),
    "avg_pool": (F.avg_pool2d, partial(forms.avg_pool, 2), (2, None, 1), {"count_include_pad": False}),
    "adaptive": (F.adaptive_avg_pool2d, partial(forms.adaptive_avg_pool, 2), ((None, 2),), {}),
    "mean": (torch.mean, forms.mean, ([1, -1],), {"keepdim": True}),
    "pad": (F.pad, forms.pad, ((1, 2, 3, 0),), {"value": 0}),
    "interpolate": (F.interpolate, forms.interpolate, (), {"scale_factor": 1.5, "mode": "bilinear"}),
    "clamp": (torch.clamp, forms.clamp, (), {"min": 0.5}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_function_with_these_arguments_computes_what_was_called(name):
    function, form, args, kwargs = CALLS[name]
    x = torch.randn(2, 3, 6, 7)
    assert torch.equal(function(*form(x, *args, **kwargs)), function(x, *args, **kwargs))
