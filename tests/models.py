"""Models that several test files prepare."""

import dataclasses
import math

import torch
from torch import nn

import qcore


def prepared_for(model, example_inputs, **options):
    options.setdefault("backend", "reference")
    mapping = qcore.get_default_qconfig_mapping(options["backend"])
    return qcore.prepare_fx(model.eval(), mapping, example_inputs, **options)


def close(found, expected):
    """Within 5 % of its own size: int8 of small random networks is far better than that."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 0.05 * expected.norm()


class Attention(nn.Module):
    """Unpacks shapes, computes on them, makes tensors of sizes, branches on arguments, writes into a slice."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.register_buffer("positions", torch.arange(64)[None])

    def forward(self, x, mask=None, flag=True):
        batch, tokens, channels = x.shape
        q, k, v = (t.view(batch, tokens, 4, channels // 4).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if isinstance(mask, torch.Tensor):
            scores = scores + mask
        steps = torch.arange(tokens)
        assert isinstance(tokens, int) and not isinstance(x, (int, list))
        scores = scores + 0.01 * (steps[None, :] - self.positions[:, :tokens].transpose(0, 1)).abs()
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, channels) + torch.zeros(batch, tokens, 1)
        assert y.shape == x.shape and y.dim() == 3
        y[:, 0] = y[:, 0] * 2
        return self.out(y) if flag else y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.kind = "block"

    def forward(self, x, mask=None, **kwargs):
        x = x + self.attention(self.norm(x), mask)
        return {"hidden": x + self.mlp(x), "cache": None, "depth": 1}


class Encoder(nn.Module):
    """Decides by data, reads attributes of its blocks, passes dictionaries: its own forward can't be a graph."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 4)

    def forward(self, ids, mask=None):
        hidden = self.embedding(ids)
        if (ids > 100).any():
            hidden = hidden * 0
        for block in self.blocks:
            assert block.kind == "block"
            hidden = block(hidden, mask=mask)["hidden"]
        return {"logits": self.head(hidden.to(self.head.weight.dtype)), "hidden": hidden}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.linear(x) * scale


class Scaled2(Scaled):
    def forward(self, x):
        return super().forward(x, 2.0)


class TwoForms(nn.Module):
    """Calls one module with different constants, and another with different shapes."""

    def __init__(self):
        super().__init__()
        self.scaled, self.plain = Scaled(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.scaled(x, 1.0) + self.scaled(x, scale=2.0)
        return Output(self.plain(y), (self.plain(y[:1]), None))


class TakesConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, constant):
        return self.layer(x) * math.copysign(1.0, constant) * (2 if constant is True else 1)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    states: tuple


torch.utils._pytree.register_dataclass(Output)
