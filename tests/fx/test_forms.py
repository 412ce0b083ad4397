"""The signatures that do more than put arguments in order: a use without a normal form stays as it is."""

import torch
import torch.nn.functional as F
from torch import nn

import qcore
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
