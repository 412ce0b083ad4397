"""In-place forms and what a graph calls in their place: new values, and inputs that are written last."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import errors
from qcore.fx.graph_module import QGraphModule
from tests.models import prepared_for


class Overwrites(nn.Module):
    """In-place forms that give nothing back but change what was there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.mish = nn.Mish(inplace=True)

    def forward(self, x):
        y = self.first(x)
        self.mish(y)
        torch.neg_(y)
        same = y
        y **= 2
        F.threshold(same, 0.1, 0.0, inplace=True)
        count = kept = x.size(0)
        count += 1
        return self.second(y) * kept + count * 0 + torch.ones(1)


@torch.no_grad()
def test_in_place_forms_keep_their_effect():
    torch.manual_seed(0)
    model = Overwrites().eval()
    names = set(vars(model)) | set(dict(model.named_buffers()))
    prepared = prepared_for(model, (torch.randn(2, 3, 8, 8),))
    assert isinstance(prepared, QGraphModule)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 9, 9)
        assert torch.allclose(prepared(x), model(x), atol=1e-5)
    assert set(vars(model)) | set(dict(model.named_buffers())) == names  # The fresh tensor isn't left on it.


class WritesAnInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x, y):
        x.add_(1)
        return self.b(self.a(x)) + self.a(y)


@torch.no_grad()
def test_inputs_that_lie_in_one_memory_aren_t_written_by_a_graph():
    torch.manual_seed(0)
    model = WritesAnInput().eval()
    prepared = prepared_for(copy.deepcopy(model), (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)))
    assert isinstance(prepared, QGraphModule)
    both = torch.randn(4, 3, 4, 4)
    x, y = both.clone().chunk(2)  # Side by side in one storage.
    assert torch.equal(prepared(x, y), model(both[:2].clone(), both[2:].clone()))
    for x, y in ((both, both), (both[:2], both[1:3])):
        before = both.clone()
        with pytest.raises(errors.GuardError, match="lies in the same memory as another"):
            prepared(x, y)
        assert torch.equal(both, before)


@torch.no_grad()
def test_a_cache_that_is_passed_in_is_filled():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, cache, position):
            cache["keys"][:, position] = self.key(x)
            return self.out(cache["keys"].sum(1))

    model, mapping = Cached().eval(), qcore.get_default_qconfig_mapping("reference")
    call = lambda batch: (torch.randn(batch, 4), {"keys": torch.zeros(batch, 3, 4)}, 1)  # noqa: E731
    prepared = qcore.prepare_fx(model, mapping, call(2), backend="reference")
    for batch in (2, 5):
        x, cache, position = call(batch)
        other = copy.deepcopy(cache)
        assert torch.equal(prepared(x, cache, position), model(x, other, position))
        assert torch.equal(cache["keys"], other["keys"]) and cache["keys"][:, 1].any()
