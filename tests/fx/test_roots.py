"""What a graph refers to: at paths that code can read, as a copy where it may change."""

import torch
from torch import nn

import qcore
from tests.models import prepared_for


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.n += 1
        return self.linear(x)


def test_a_module_that_is_kept_whole_starts_as_it_was():
    custom = qcore.PrepareCustomConfig().set_non_traceable_module_classes([Counts])
    model = nn.Sequential(nn.Linear(4, 4), Counts())
    prepared = prepared_for(model, (torch.randn(2, 4),), prepare_custom_config=custom)
    kept = prepared.get_submodule("1")
    assert (model[1].calls, kept.calls, float(model[1].n), float(kept.n)) == (0, 0, 0.0, 0.0)
    prepared(torch.randn(2, 4))
    assert (model[1].calls, kept.calls, float(model[1].n), float(kept.n)) == (0, 1, 0.0, 1.0)
