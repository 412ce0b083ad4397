"""Small models, each of one operator that a backend may have a kernel for, in all forms and awkward sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One small model.

    Attributes:
        name: for reports; begins with the operator's name.
        build: makes the model.
        shapes: shapes of its inputs, for a batch of 2.
        is_extreme: whether inputs are only the smallest and the largest value.
        is_batched: whether inputs have a batch dimension; without, ``shapes`` are the whole shapes.
        unit: how large the inputs are.
        core: makes the part of the model that is under test, if the rest is only there to give it integers.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    is_extreme: bool = field(default=False)
    is_batched: bool = field(default=True)
    unit: float = field(default=1.0)
    core: Callable[[], nn.Module] | None = field(default=None)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Random inputs for a batch of any size."""
        made = []
        for shape in self.shapes:
            x = torch.randn((batch, *shape[1:]) if self.is_batched else shape) * self.unit
            made.append((x > 0).float() if self.is_extreme else x)
        return tuple(made)


class _Function(nn.Module):
    """A model that only calls a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class _One(_Function):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(x)


class _Two(_Function):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(x, y)


class _After(nn.Module):
    """A function of a convolution's output, so that it gets integers to work on."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class _Behind(nn.Module):
    """A model twice, with weights of its own each time, on the same integers: what layers before it give.

    Args:
        build: makes the model.
        case: the case that it is of.
        views: let the integers be views: half of a larger tensor, with other strides than they would have.
    """

    def __init__(self, build: Callable[[], nn.Module], case: Case, views: bool) -> None:
        super().__init__()
        self.core, self.again = build(), build()
        self.dim = int(case.is_batched)
        self.views = views
        self.before = nn.ModuleList(self.layer(shape) for shape in case.shapes)

    def layer(self, shape: Shape) -> nn.Module:
        """What gives integers for one input."""
        channels, rank = shape[self.dim], len(shape) - self.dim
        width = 2 * channels if self.views else channels
        if rank == 1:
            return nn.Linear(channels, width, bias=False)
        layer: nn.Module = getattr(nn, f"Conv{rank - 1}d")(channels, width, 1, bias=False)
        return layer

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        integers = []
        for layer, x in zip(self.before, inputs, strict=True):
            turned = self.views and x.dim() > self.dim + 2
            y = layer(x.transpose(-1, -2) if turned else x)
            if self.views:
                y = y.chunk(2, self.dim)[1]
            integers.append(y.transpose(-1, -2) if turned else y)
        return self.core(*integers), self.again(*integers)


def behind(case: Case, views: bool) -> Case:
    """A case whose model reads integers that are read again after it: what one kernel did to them, the next one reads.

    Args:
        case: any.
        views: whether the integers are views, as what only moves elements gives them.
    """
    build = case.core or case.build
    name = f"{case.name}, on {'views of ' if views else ''}integers read twice"
    return replace(case, name=name, build=lambda: _Behind(build, case, views), core=None)


class _Residual(nn.Module):
    """A convolution with a residual, and whatever comes after."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor], swap: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.after = after
        self.swap = swap

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.conv(x)
        return self.after(x + y if self.swap else y + x, x)


class _Shuffle(nn.Module):
    """Halves of the channels, one of them through a convolution, joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return torch.cat([a, self.conv(b)], 1)


class _HalfClamped(nn.Module):
    """A clamped result and another that share qparams, so that the clamp's bounds lie within the range of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.hardtanh(self.first(x), -0.2, 0.3), self.second(x)], 1)


class _Functional(nn.Module):
    """Weights that are parameters of the model itself, and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.matrix = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding="same", stride=1).mean([2, 3])
        return F.linear(input=y, weight=self.matrix)


class _Cell(nn.Module):
    """A recurrent cell, by its function: an operator with two weights and two biases."""

    def __init__(self, function: Callable[..., Tensor], gates: int, bias: bool = True) -> None:
        super().__init__()
        self.function = function
        self.w_ih, self.w_hh = nn.Parameter(torch.randn(gates * 5, 7) / 3), nn.Parameter(torch.randn(gates * 5, 5) / 3)
        self.b_ih = nn.Parameter(torch.randn(gates * 5)) if bias else None
        self.b_hh = nn.Parameter(torch.randn(gates * 5)) if bias else None

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.function(x, state, self.w_ih, self.w_hh, self.b_ih, self.b_hh)


def _conv(*arguments: Any, n: int = 2, **keywords: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(getattr(nn, f"Conv{n}d")(*arguments, **keywords))


def _transposed(*arguments: Any, n: int = 2, **keywords: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(getattr(nn, f"ConvTranspose{n}d")(*arguments, **keywords))


def _then(module: Callable[[], nn.Module], *activations: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(module(), *(activation() for activation in activations))


_IMAGE: Shape = (2, 4, 7, 9)
_WIDE: Shape = (2, 16, 6, 6)

#: Far below float32's epsilon; a step of a result, and its product with a weight's, is still a normal number.
_TINY = 1e-30

_WEIGHTED = [
    Case("conv2d 3x3", _conv(4, 6, 3, padding=1), (_IMAGE,)),
    Case("conv2d of 3 channels, stride 2", _conv(3, 8, 3, stride=2, padding=1), ((2, 3, 9, 9),)),
    Case("conv2d 1x1 without bias", _conv(16, 24, 1, bias=False), (_WIDE,)),
    Case(
        "conv2d 5x3, padding (2, 0), dilation (1, 2)", _conv(4, 3, (5, 3), padding=(2, 0), dilation=(1, 2)), (_IMAGE,)
    ),
    Case("conv2d grouped", _conv(16, 32, 3, padding=1, groups=4), (_WIDE,)),
    Case("conv2d of 17 channels", _conv(17, 5, 3), ((2, 17, 6, 6),)),
    Case("conv2d depthwise 3x3", _conv(16, 16, 3, padding=1, groups=16), (_WIDE,)),
    Case("conv2d depthwise 5x5, stride 2", _conv(16, 16, 5, padding=2, stride=2, groups=16), (_WIDE,)),
    Case("conv2d depthwise 3x3, no padding, stride 2", _conv(16, 16, 3, stride=2, groups=16), (_WIDE,)),
    Case("conv2d depthwise 5x5, no padding, stride 1", _conv(16, 16, 5, groups=16), (_WIDE,)),
    Case("conv2d depthwise, 2 outputs each", _conv(8, 16, 3, padding=1, groups=8), ((2, 8, 6, 6),)),
    Case("conv2d depthwise of one row, padded rows", _conv(16, 16, (1, 3), padding=(1, 0), groups=16), (_WIDE,)),
    Case("conv2d of one channel", _conv(1, 4, 3, padding=1), ((2, 1, 6, 6),)),
    Case("conv2d padding same", _conv(4, 4, 3, padding="same"), (_IMAGE,)),
    Case("conv2d padding same, even kernel", _conv(4, 4, 2, padding="same"), (_IMAGE,)),
    Case("conv2d padding valid", _conv(4, 4, 3, padding="valid"), (_IMAGE,)),
    Case("conv2d padding by reflection", _conv(4, 4, 3, padding=1, padding_mode="reflect"), (_IMAGE,)),
    Case("conv2d + batch norm + ReLU", _then(_conv(4, 6, 3), lambda: nn.BatchNorm2d(6), nn.ReLU), (_IMAGE,)),
    Case("conv2d + ReLU6", _then(_conv(4, 6, 3), nn.ReLU6), (_IMAGE,)),
    Case("conv2d + hardtanh", _then(_conv(4, 6, 3), lambda: nn.Hardtanh(-0.3, 0.2)), (_IMAGE,)),
    Case("conv2d + clamp above zero", _then(_conv(4, 6, 3), lambda: nn.Hardtanh(0.1, 0.4)), (_IMAGE,)),
    Case("conv2d + hardswish", _then(_conv(4, 6, 3), nn.Hardswish), (_IMAGE,)),
    Case("conv2d + hardsigmoid", _then(_conv(4, 6, 3), nn.Hardsigmoid), (_IMAGE,)),
    Case("conv2d without bias + hardsigmoid", _then(_conv(4, 6, 3, bias=False), nn.Hardsigmoid), (_IMAGE,)),
    Case("conv2d + SiLU", _then(_conv(4, 6, 3), nn.SiLU), (_IMAGE,)),
    Case("conv1d", _conv(4, 6, 3, n=1, padding=1), ((2, 4, 11),)),
    Case("conv1d depthwise + ReLU", _then(_conv(8, 8, 3, n=1, groups=8), nn.ReLU), ((2, 8, 11),)),
    Case("conv3d", _conv(4, 6, 3, n=3, padding=1), ((2, 4, 5, 6, 7),)),
    Case("conv3d + ReLU", _then(_conv(4, 6, 2, n=3), nn.ReLU), ((2, 4, 4, 4, 4),)),
    Case("conv2d functional, linear by keyword", _Functional, (_IMAGE,)),
    Case("conv2d unbatched", _conv(4, 6, 3, padding=1), ((4, 7, 9),), is_batched=False),
    Case("conv2d depthwise, unbatched", _conv(8, 8, 3, groups=8), ((8, 6, 6),), is_batched=False),
    Case("conv1d unbatched", _conv(4, 6, 3, n=1), ((4, 11),), is_batched=False),
    Case("conv2d of tiny values", _conv(4, 6, 3, bias=False), (_IMAGE,), unit=_TINY),
    Case("conv2d depthwise, of tiny values", _conv(16, 16, 3, groups=16, bias=False), (_WIDE,), unit=_TINY),
    Case("conv_transpose2d", _transposed(4, 6, 3, stride=2, padding=1, output_padding=1), (_IMAGE,)),
    Case("conv_transpose2d grouped", _transposed(8, 8, 2, stride=2, groups=2), ((2, 8, 5, 5),)),
    Case("conv_transpose2d depthwise", _transposed(8, 8, 3, groups=8), ((2, 8, 5, 5),)),
    Case("conv_transpose2d + ReLU", _then(_transposed(4, 6, 2, bias=False), nn.ReLU), (_IMAGE,)),
    Case("conv_transpose2d 2x2 of 8 channels", _transposed(8, 8, 2, stride=2), ((2, 8, 5, 5),)),
    Case("conv_transpose1d", _transposed(4, 6, 3, n=1, stride=2), ((2, 4, 11),)),
    Case("linear", lambda: nn.Sequential(nn.Linear(7, 5)), ((2, 7),)),
    Case("linear 3d without bias", lambda: nn.Sequential(nn.Linear(16, 8, bias=False)), ((2, 3, 16),)),
    Case("linear + ReLU", lambda: nn.Sequential(nn.Linear(33, 10), nn.ReLU()), ((2, 33),)),
    Case("linear unbatched", lambda: nn.Sequential(nn.Linear(7, 5)), ((7,),), is_batched=False),
    Case("linear of tiny values", lambda: nn.Sequential(nn.Linear(7, 5, bias=False)), ((2, 7),), unit=_TINY),
    Case("linear + batch norm", lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), ((2, 8),)),
    Case("linear + clamp below zero", lambda: nn.Sequential(nn.Linear(8, 6), nn.Hardtanh(-0.4, -0.1)), ((2, 8),)),
    Case("linear + GELU", lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU()), ((2, 8),)),
    Case("linear + hardsigmoid", lambda: nn.Sequential(nn.Linear(8, 6), nn.Hardsigmoid()), ((2, 8),)),
    Case("linear + leaky ReLU", lambda: nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.2)), ((2, 8),)),
    Case("linear + tanh", lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh()), ((2, 8),)),
    Case("gru_cell", lambda: _Cell(torch.gru_cell, 3), ((2, 7), (2, 5))),
    Case("gru_cell without biases", lambda: _Cell(torch.gru_cell, 3, bias=False), ((2, 7), (2, 5))),
    Case("rnn_tanh_cell", lambda: _Cell(torch.rnn_tanh_cell, 1), ((2, 7), (2, 5))),
    Case("rnn_relu_cell", lambda: _Cell(torch.rnn_relu_cell, 1), ((2, 7), (2, 5))),
]

_RESIDUAL = [
    Case("conv2d + add", lambda: _Residual(lambda y, x: y), ((2, 8, 5, 5),)),
    Case("conv2d + add, swapped, + ReLU", lambda: _Residual(lambda y, x: F.relu(y), swap=True), ((2, 8, 5, 5),)),
    Case("conv2d + add, residual read later", lambda: _Residual(lambda y, x: y * x), ((2, 8, 5, 5),)),
    Case("conv2d depthwise + add + ReLU6", lambda: _Residual(lambda y, x: F.relu6(y), groups=8), ((2, 8, 5, 5),)),
]

_BINARY = [
    Case("add", lambda: _Two(torch.add), (_IMAGE, _IMAGE)),
    Case("add + ReLU", lambda: _Two(lambda x, y: F.relu(x + y)), (_IMAGE, _IMAGE)),
    Case("add + clamp above zero", lambda: _Two(lambda x, y: (x + y).clamp(0.2, 1.0)), (_IMAGE, _IMAGE)),
    Case("add of vectors", lambda: _Two(torch.add), ((2, 9), (2, 9))),
    Case("add broadcast", lambda: _Two(torch.add), (_IMAGE, (2, 4, 1, 1))),
    Case("add of itself", lambda: _One(lambda x: x + x), (_IMAGE,)),
    Case("add of a number", lambda: _One(lambda x: x + 1.5), (_IMAGE,)),
    Case("add of tiny values", lambda: _Two(torch.add), (_IMAGE, _IMAGE), unit=_TINY),
    Case("mul", lambda: _Two(torch.mul), (_IMAGE, _IMAGE)),
    Case("mul + ReLU", lambda: _Two(lambda x, y: F.relu(x * y)), (_IMAGE, _IMAGE)),
    Case("mul broadcast", lambda: _Two(torch.mul), (_IMAGE, (2, 4, 1, 1))),
    Case("mul broadcast, the smaller first", lambda: _Two(lambda x, y: y * x), (_IMAGE, (2, 4, 1, 1))),
    Case("mul by a scale for each channel", lambda: _Two(torch.mul), ((2, 72, 3, 2), (2, 72, 1, 1))),
    Case("mul by a number", lambda: _One(lambda x: 0.3 * x), (_IMAGE,)),
    Case("cat with a convolution", _Shuffle, (_IMAGE,)),
    Case("cat with a clamped convolution", _HalfClamped, (_IMAGE,)),
    Case("cat of different ranges", lambda: _After(lambda x: torch.cat([x, torch.sigmoid(x)], 1)), (_IMAGE,)),
]

_AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, ceil": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_avg_pool2d + flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "mean": lambda x: x.mean([2, 3]),
    "mean of one dimension": lambda x: x.mean(1),
    "mean, keepdim": lambda x: x.mean(dim=(2, 3), keepdim=True),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "clamp after a pool": lambda x: F.max_pool2d(x, 2).clamp(-0.2, 0.1),
    "clamp of something read twice": lambda x: torch.cat([x, x.clamp(min=0.05)], 1),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.size(0), -1),
    "view": lambda x: x.view(x.shape[0], 4, -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(2).squeeze(2),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split": lambda x: torch.split(x, [1, 3], 1)[1],
    "slice": lambda x: x[:, 1:3, ::2],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "stack": lambda x: torch.stack([x, x], 1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "pad by reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "interpolate nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "interpolate bilinear": lambda x: F.interpolate(x, size=(10, 11), mode="bilinear", align_corners=False),
    "interpolate bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}

_ONE_AND_THREE_DIMENSIONS = [
    Case("max_pool1d", lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.MaxPool1d(2)), ((2, 4, 9),)),
    Case("avg_pool1d", lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.AvgPool1d(2)), ((2, 4, 9),)),
    Case("max_pool3d", lambda: nn.Sequential(nn.Conv3d(4, 4, 1), nn.MaxPool3d(2)), ((2, 4, 4, 5, 6),)),
    Case("adaptive_avg_pool3d", lambda: nn.Sequential(nn.Conv3d(4, 4, 1), nn.AdaptiveAvgPool3d(1)), ((2, 4, 4, 5, 6),)),
]

#: One model for each operator and form; an operator that a backend doesn't know stays float, and passes.
CASES: tuple[Case, ...] = (
    *_WEIGHTED,
    *_RESIDUAL,
    *_BINARY,
    *(
        Case(name, lambda f=function: _After(f), (_IMAGE,), core=lambda f=function: _One(f))  # type: ignore[misc]
        for name, function in _AFTER.items()
    ),
    *_ONE_AND_THREE_DIMENSIONS,
)


def _extreme(module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The model with weights of one size and both signs, in runs, so that neighbouring products pile up."""

    def build() -> nn.Module:
        made = module()
        for parameter in made.parameters():
            if parameter.dim() > 1:
                rows = parameter.data.view(parameter.shape[0], -1)
                for number, row in enumerate(rows):
                    signs = torch.ones_like(row) if number % 2 else torch.where(torch.rand_like(row) > 0.3, 1.0, -1.0)
                    row.copy_(signs * (0.5 if number % 4 < 2 else 0.01))
        return made

    return build


#: Weights and activations at the ends of their ranges, where 16-bit sums would saturate.
EXTREME_CASES: tuple[Case, ...] = tuple(
    Case(name, _extreme(build), shapes, is_extreme=True)
    for name, build, shapes in (
        ("conv2d 3x3", _conv(16, 8, 3, padding=1), (_WIDE,)),
        ("conv2d 1x1", _conv(16, 8, 1), (_WIDE,)),
        ("conv2d of 3 channels", _conv(3, 8, 3, padding=1), ((2, 3, 6, 6),)),
        ("conv2d of one channel", _conv(1, 8, 3, padding=1), ((2, 1, 6, 6),)),
        ("conv2d grouped", _conv(16, 16, 3, padding=1, groups=2), (_WIDE,)),
        ("conv2d depthwise 3x3", _conv(16, 16, 3, padding=1, groups=16), (_WIDE,)),
        ("conv2d depthwise 5x5", _conv(16, 16, 5, padding=2, groups=16), (_WIDE,)),
        ("conv1d", _conv(8, 8, 3, n=1, padding=1), ((2, 8, 9),)),
        ("conv1d depthwise", _conv(8, 8, 3, n=1, padding=1, groups=8), ((2, 8, 9),)),
        ("conv3d", _conv(8, 8, 2, n=3), ((2, 8, 4, 4, 4),)),
        ("conv3d depthwise", _conv(8, 8, 3, n=3, padding=1, groups=8), ((2, 8, 4, 4, 4),)),
        ("linear", lambda: nn.Sequential(nn.Linear(64, 8)), ((2, 64),)),
        ("linear of 33 inputs", lambda: nn.Sequential(nn.Linear(33, 8)), ((2, 33),)),
        ("linear of 140,000 inputs", lambda: nn.Sequential(nn.Linear(140_000, 4)), ((2, 140_000),)),
        ("conv2d + add", lambda: _Residual(lambda y, x: y), ((2, 8, 5, 5),)),
    )
)
