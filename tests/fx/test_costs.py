"""What operators cost: multiply-adds on the example inputs, and weights."""

import pytest
import torch
from torch import nn

import qcore


def test_shares_of_multiply_adds_and_weights():
    mapping = qcore.get_default_qconfig_mapping("reference").set_module_name("1", None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 2)).eval()
    prepared = qcore.prepare_fx(model, mapping, (torch.randn(1, 3, 6, 6),), backend="reference")
    plan = qcore.explain(prepared)
    assert [d.multiply_adds for d in plan.decisions] == [16 * 8 * 27, 16 * 4 * 8, 0, 128]
    assert plan.multiply_add_share == pytest.approx((3456 + 128) / (3456 + 512 + 128))
    assert plan.weight_share == pytest.approx((216 + 128) / (216 + 32 + 128))
    assert "(88% of multiply-adds, 91% of weights)" in plan.summary()
