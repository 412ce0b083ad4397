"""What operators cost: multiply-adds on the example inputs, and weights."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qcore
from qcore.fx.costs import module_weights, multiply_adds, weight_count
from qcore.fx.shapes import propagate_examples
from qcore.fx.tracer import trace


def test_shares_of_multiply_adds_and_weights():
    mapping = qcore.get_default_qconfig_mapping("reference").set_module_name("1", None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 2)).eval()
    prepared = qcore.prepare_fx(model, mapping, (torch.randn(1, 3, 6, 6),), backend="reference")
    plan = qcore.explain(prepared)
    assert [d.multiply_adds for d in plan.decisions] == [16 * 8 * 27, 16 * 4 * 8, 0, 128]
    assert plan.multiply_add_share == pytest.approx((3456 + 128) / (3456 + 512 + 128))
    assert plan.weight_share == pytest.approx((216 + 128) / (216 + 32 + 128))
    assert "(88% of multiply-adds, 91% of weights)" in plan.summary()


class Calls(nn.Module):
    def __init__(self, function, *tensors):
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(tensors)

    def forward(self, x):
        return self.function(x, *self.tensors)


def costed(model, *inputs):
    module = trace(nn.Sequential(model).eval())
    propagate_examples(module, inputs)
    return [(multiply_adds(n, module), weight_count(n, module)) for n in module.graph.nodes if n.op.startswith("call")]


PRODUCTS = {
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 8)),
    "conv1d in groups": (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (2, 4, 9)),
    "depthwise conv3d": (nn.Conv3d(4, 4, 2, groups=4), (1, 4, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 6)),
    "transposed in groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "linear": (nn.Linear(4, 6), (2, 3, 4)),
    "product of matrices": (Calls(lambda x, w: torch.matmul(x, w), torch.randn(2, 4, 6)), (2, 3, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_multiply_adds_are_those_that_torch_counts(name):
    model, shape = PRODUCTS[name]
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert sum(count for count, _ in costed(model, x)) == counter.get_total_flops() / 2 > 0


def test_weights_are_those_of_products_and_not_biases_or_norms():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    assert [count for _, count in costed(model, torch.randn(3, 4))] == [24, 0, 0, 12]


def test_a_recurrent_module_costs_its_weights_at_each_step():
    (found,) = [c for c in costed(Takes(nn.LSTM(4, 5, batch_first=True)), torch.randn(2, 7, 4)) if c[1]]
    weights = 4 * 5 * (4 + 5)
    assert found == (2 * 7 * weights, weights)
    (found,) = [c for c in costed(nn.GRUCell(4, 5), torch.randn(3, 4)) if c[1]]
    assert found == (3 * 3 * 5 * (4 + 5), 3 * 5 * (4 + 5))


class Takes(nn.Module):
    """The first of several results."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def test_a_table_that_is_looked_up_has_weights_and_no_products():
    assert costed(nn.Embedding(10, 4), torch.tensor([[1, 2]]))[-1] == (0, 40)


def test_what_is_computed_from_weights_alone_is_counted_where_it_is_read():
    """A matrix that is turned before it multiplies is one weight, not two."""
    model = Calls(lambda x, w: torch.einsum("bi,oi->bo", x, w.exp()), torch.randn(6, 4))
    assert [count for _, count in costed(model, torch.randn(3, 4))] == [0, 0]
    model = Calls(lambda x, w: torch.einsum("bi,oi->bo", x, w), torch.randn(6, 4))
    assert [count for _, count in costed(model, torch.randn(3, 4))] == [24]


def test_a_module_s_own_weights_or_those_of_all_within():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model.table = nn.Parameter(torch.zeros(3, 5))
    assert (module_weights(model), module_weights(model, recurse=False)) == (24 + 15, 15)
