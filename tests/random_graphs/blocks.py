"""Modules that random models are made of besides torch's own: containers, state, and what can't be a graph."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolution, batch norm, ReLU, convolution, and what went in added in place; any number of dimensions."""

    def __init__(self, channels: int, dimensions: int, inplace: bool) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
        self.a = conv(channels, channels, 3, padding=1, bias=False)
        self.norm = norm(channels)
        self.relu = nn.ReLU(inplace=inplace)
        self.b = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Uses one activation module twice."""
        y = self.relu(self.norm(self.a(x)))
        y = self.b(y)
        y += x
        return self.relu(y)


class Gate(nn.Module):
    """Squeeze and excitation: every channel times a number of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, max(1, channels // 2), 1)
        self.up = nn.Conv2d(max(1, channels // 2), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Broadcasts."""
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class ByData(nn.Module):
    """Decides by its data, so it stays Python; the linear layer or convolution in it is a graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Two ways."""
        if float(x.detach().flatten()[0]) > 0:
            return self.inner(x)
        return self.inner(-x)


class Counting(nn.Module):
    """Writes into a buffer of its own at each call, and computes with it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The second call gives something else than the first."""
        self.calls.add_(1)
        return x + self.calls


class BySize(nn.Module):
    """Computes otherwise for large batches: a guard has to tell."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Two ways."""
        return self.inner(x) if x.size(0) < 4 else self.inner(x) + x.size(0)


class Branches(nn.Module):
    """A dictionary and a list of modules, one of which is called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict({"first": nn.Linear(width, width), "second": nn.Linear(width, width)})
        self.rows = nn.ModuleList([nn.ReLU(), nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor) -> dict[str, Any]:
        """A dictionary of what each gives."""
        found = {name: module(x) for name, module in self.by_name.items()}
        for module in (*self.rows, self.rows[1]):
            found["second"] = module(found["second"])
        return found


class Attention(nn.Module):
    """Self-attention over the middle dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The attended values only."""
        found: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return found
