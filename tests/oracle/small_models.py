"""Small models for the comparison with torch.ao."""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE = (2, 3, 8, 8)
ROWS = (4, 8)


class Call(nn.Module):
    """A model whose forward is a function of itself and its inputs."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def conv(channels_in=3, channels_out=4, **arguments):
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **arguments)


def norm(channels=4):
    """A batch norm that has seen data."""
    made = nn.BatchNorm2d(channels)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    nn.init.uniform_(made.weight, 0.5, 2)
    nn.init.normal_(made.bias)
    return made


def conv_bn_relu():
    return nn.Sequential(conv(), norm(), nn.ReLU(), conv(4, 4), norm(), conv(4, 4), nn.ReLU())


def depthwise():
    return nn.Sequential(conv(), nn.ReLU(), conv(4, 4, groups=4, bias=False), norm(), nn.ReLU(), nn.Conv2d(4, 6, 1))


def conv_transpose():
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), conv(4, 4))


def conv1d():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 1))


def linear_relu():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def residual():
    def forward(model, x):
        y = model.first(x)
        return model.last(F.relu(y + model.second(y)))

    return Call(forward, first=conv(), second=conv(4, 4), last=conv(4, 4))


def residual_relu_module():
    def forward(model, x):
        y = model.relu1(model.first(x))
        return model.last(model.relu2(model.second(y) + y))

    return Call(forward, first=conv(), relu1=nn.ReLU(), second=conv(4, 4), relu2=nn.ReLU(), last=conv(4, 4))


def functional_chain():
    def forward(model, x):
        return F.conv2d(F.relu(F.conv2d(x, model.w, model.b, padding=1)), model.v)

    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 1, 1)}
    return Call(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def called_twice():
    return Call(
        lambda model, x: model.linear(model.linear(x) * model.other(x)), linear=nn.Linear(8, 8), other=nn.Linear(8, 8)
    )


def multiplied():
    return Call(lambda model, x: model.first(x) * model.second(x), first=conv(), second=conv())


def hardswish():
    return nn.Sequential(conv(), norm(), nn.Hardswish(), conv(4, 4), nn.Hardswish())


def functional_hardswish():
    return Call(lambda model, x: F.hardswish(model.first(x)), first=conv())


def leaky():
    return nn.Sequential(conv(), nn.LeakyReLU(), conv(4, 4), nn.ELU())


def gated():
    def forward(model, x):
        y = model.first(x)
        return model.last(y * model.gate(model.second(y)))

    return Call(forward, first=conv(), second=conv(4, 4), gate=nn.Sigmoid(), last=conv(4, 4))


def fixed_chain():
    return Call(
        lambda model, x: model.last(torch.tanh(model.middle(torch.sigmoid(model.first(x))))),
        first=nn.Linear(8, 6), middle=nn.Linear(6, 6), last=nn.Linear(6, 4),
    )  # fmt: skip


def float_island():
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def functional_island():
    def forward(model, x):
        return model.last(F.softplus(model.first(x)) - 1)

    return Call(forward, first=nn.Linear(8, 6), last=nn.Linear(6, 4))


def matmul():
    return Call(lambda model, x: torch.matmul(model.a(x), model.b(x)), a=nn.Linear(8, 4), b=nn.Linear(8, 4))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lin1 = nn.Linear(width, width)
        self.act = nn.ReLU()
        self.lin2 = nn.Linear(width, width)

    def forward(self, x):
        return torch.add(x, self.lin2(self.act(self.lin1(x))))


class Stage(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = Block(width)
        self.other = Block(width)
        self.head = nn.Linear(width, width)

    def forward(self, x):
        return F.hardswish(self.head(self.block(x) * self.other(x)))


class Nested(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.stage = Stage(width)
        self.stage2 = Stage(width)
        self.tail = nn.Sequential(nn.Linear(width, width), nn.ReLU(), Block(width))

    def forward(self, x):
        y = self.stage(self.first(x))
        return self.tail(torch.add(y, self.stage2(y)))
