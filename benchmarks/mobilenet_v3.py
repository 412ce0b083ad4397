"""MobileNetV3-Large as torchvision builds it, in plain torch.nn; with random weights, which time doesn't depend on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Rows: kernel size, expanded channels, output channels, squeeze-and-excitation, hardswish, stride.
_BLOCKS: Sequence[tuple[int, int, int, bool, bool, int]] = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


def _rounded(channels: int) -> int:
    """To a multiple of 8, losing no more than a tenth."""
    result = max(8, (channels + 4) // 8 * 8)
    return result if result >= 0.9 * channels else result + 8


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    activation: type[nn.Module] | None,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class _SqueezeExcitation(nn.Module):
    """Scales each channel by what two small layers make of the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _rounded(channels // 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.relu = nn.Conv2d(channels, squeezed, 1), nn.ReLU()
        self.fc2, self.gate = nn.Conv2d(squeezed, channels, 1), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """The scaled channels."""
        scale: Tensor = self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))
        return scale * x


class _Block(nn.Module):
    """Expand, depthwise, squeeze and excite, project; with a shortcut where the shapes allow it."""

    def __init__(
        self, in_channels: int, kernel_size: int, expanded: int, out: int, excites: bool, hardswish: bool, stride: int
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hardswish else nn.ReLU
        layers = [_conv(in_channels, expanded, 1, activation)] if expanded != in_channels else []
        layers.append(_conv(expanded, expanded, kernel_size, activation, stride=stride, groups=expanded))
        excitation = [_SqueezeExcitation(expanded)] if excites else []
        self.block = nn.Sequential(*layers, *excitation, _conv(expanded, out, 1, None))
        self.has_shortcut = stride == 1 and in_channels == out

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        y: Tensor = self.block(x)
        return y + x if self.has_shortcut else y


class MobileNetV3Large(nn.Module):
    """MobileNetV3-Large of width 1.0."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 16, 3, nn.Hardswish, stride=2)]
        channels = 16
        for kernel_size, expanded, out, excites, hardswish, stride in _BLOCKS:
            layers.append(_Block(channels, kernel_size, expanded, out, excites, hardswish, stride))
            channels = out
        layers.append(_conv(channels, 6 * channels, 1, nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        y: Tensor = self.classifier(self.flatten(self.pool(self.features(x))))
        return y


def mobilenet_v3_large() -> nn.Module:
    """MobileNetV3-Large with the same random weights every time, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MobileNetV3Large().eval()
