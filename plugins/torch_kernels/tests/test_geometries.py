"""Convolutions of awkward geometries on every backend: as the reference, and the same at each call."""

import random

import pytest
import torch
from torch import Tensor, nn

import qcore
from qcore.errors import NothingToQuantizeError, ShapeError
from qcore.testing import steps_apart

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fill_memory() -> None:
    """Leave numbers of all kinds in memory that the next tensors will be made of."""
    for size in (64, 1024, 16384, 262144):
        held = [torch.full((size,), value, dtype=torch.uint8) for value in (255, 128, 1)]
        held += [torch.full((size // 4,), float("nan"))]
        del held


def check(backend: str, module: nn.Module, x: Tensor, *others: Tensor) -> None:
    """A kernel's results on ``x``, which it is prepared with, and on others."""
    model = nn.Sequential(module).eval()
    mapping = qcore.get_default_qconfig_mapping(backend)
    with torch.no_grad():
        try:
            prepared = qcore.prepare_fx(model, mapping, (x,), backend=backend, on_unsupported="ignore")
        except NothingToQuantizeError:  # The backend has no kernel of this kind.
            return
        for inputs in (x, *others):
            prepared(inputs)
        reference, converted = qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)
        for inputs in (x, *others):
            expected, found = reference(inputs), []
            for _ in range(4):
                fill_memory()
                found.append(converted(inputs))
            assert steps_apart(reference, expected, found[0])[0] <= 1.01, (module, tuple(inputs.shape))
            assert all(torch.equal(result, found[0]) for result in found), (module, tuple(inputs.shape))


def sizes(sample: random.Random, dimensions: int, choices: list[int]) -> list[int]:
    return [sample.choice(choices) for _ in range(dimensions)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kinds", [CONVS, TRANSPOSED], ids=["conv", "transposed"])
def test_random_geometries(installed_backend: str, kinds: tuple[type[nn.Module], ...], seed: int):
    sample, done = random.Random(seed), 0
    while done < 3:
        n = sample.choice([1, 2, 2, 3])
        groups = sample.choice([1, 1, 3, 8])
        inputs, outputs = (sample.choice([1, 2, 4, 5, 8, 16]) for _ in range(2))
        kernel, stride, dilation = (sizes(sample, n, choices) for choices in ([1, 2, 3, 4], [1, 1, 2, 3], [1, 1, 2]))
        padding = [sample.randrange(k + 1) for k in kernel]
        layer = kinds[n - 1](
            groups * inputs,
            groups * outputs,
            kernel,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=sample.random() < 0.5,
        )
        x = torch.randn(sample.choice([1, 2, 5]), groups * inputs, *sizes(sample, n, [1, 2, 3, 5, 8]))
        try:
            if layer(x).numel() == 0:
                continue
        except RuntimeError:  # Smaller than the kernel.
            continue
        check(installed_backend, layer, x)
        done += 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(2, 1), (2, 2), (2, 3), (2, 6), (3, 2), (2, 7)], ids=str)
def test_transposed_convolutions_of_two_rows(installed_backend: str, kernel: tuple[int, int], stride: int):
    for inputs, outputs in ((8, 8), (16, 24), (8, 9)):
        layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride)
        check(installed_backend, layer, torch.randn(2, inputs, 5, 6), torch.randn(1, inputs, 8, 8))


@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["zero point 0", "zero point"])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        # One column, and steps along it.
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), (9, 1)),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 2)),
        (nn.Conv2d(8, 16, (1, 3), stride=(1, 2)), (5, 4)),
        (nn.Conv2d(8, 16, 5, stride=2), (9, 6)),
        (nn.Conv2d(4, 4, 6, stride=3, padding=(5, 1)), (9, 4)),
        (nn.Conv1d(8, 16, 3, stride=2), (4,)),
        (nn.Conv3d(7, 24, 3, stride=(1, 2, 3), padding=(2, 0, 2)), (4, 6, 1)),
        # Windows that lie in nothing but padding.
        (nn.Conv2d(4, 5, (3, 1), stride=2, padding=(2, 1), dilation=3), (3, 1)),
        (nn.Conv2d(16, 16, (1, 2), stride=(1, 2), padding=(0, 3), dilation=2), (6, 1)),
        (nn.Conv1d(16, 16, 1, stride=2, padding=1), (1,)),
        (nn.Conv3d(32, 4, (2, 3, 3), padding=(1, 3, 3), dilation=(3, 2, 3), groups=4), (2, 4, 3)),
        # A padded volume of one layer.
        (nn.Conv3d(3, 8, 3, padding=1), (1, 5, 6)),
        (nn.Conv3d(9, 9, (2, 3, 3), padding=1, groups=9), (1, 6, 6)),
        # Padding above and below only, and around dilated windows.
        (nn.Conv2d(8, 16, (2, 1), padding=(1, 0)), (5, 96)),
        (nn.Conv2d(24, 8, (5, 3), padding=(2, 0), dilation=(1, 2)), (9, 96)),
        (nn.Conv2d(40, 16, (3, 5), padding=2, dilation=2), (17, 96)),
        (nn.Conv2d(16, 16, (7, 3), padding=(6, 1), dilation=2), (16, 113)),
        (nn.Conv3d(32, 16, (3, 1, 1), padding=(1, 0, 0)), (5, 5, 56)),
    ],
    ids=str,
)
def test_windows_at_the_edges(installed_backend: str, layer: nn.Module, size: tuple[int, ...], shift: float):
    x = torch.rand(2, layer.in_channels, *size) - shift
    larger = torch.rand(1, layer.in_channels, *[n + 3 for n in size]) - shift
    check(installed_backend, layer, x, larger)


class Residual(nn.Module):
    """A convolution of one column, with a residual of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.conv(x) + x[:, :, ::2, ::2]


def test_a_residual_of_one_column(installed_backend: str):
    model, x = Residual().eval(), torch.randn(2, 8, 9, 2)
    prepared = qcore.prepare_fx(
        model, qcore.get_default_qconfig_mapping(installed_backend), (x,), on_unsupported="ignore"
    )
    with torch.no_grad():
        prepared(x)
        reference, converted = qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)
        for _ in range(4):
            fill_memory()
            assert steps_apart(reference, reference(x), converted(x))[0] <= 3


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 8, 3), (2,)),
        (nn.Conv2d(3, 8, 3), (8, 2)),
        (nn.Conv2d(8, 8, 3, groups=8), (2, 2)),
        (nn.Conv2d(3, 8, 3, padding=(0, 1), dilation=2), (4, 9)),
        (nn.Conv3d(3, 8, 3), (5, 2, 5)),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(3)), (2, 8)),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3)), (2, 8)),
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.MaxPool1d(3)), (2,)),
        (nn.Sequential(nn.Conv3d(3, 8, 1), nn.AvgPool3d(3)), (2, 4, 4)),
    ],
    ids=str,
)
def test_an_input_smaller_than_the_kernel_is_refused_as_by_the_float_model(
    installed_backend: str, layer: nn.Module, size: tuple[int, ...]
):
    channels = next(layer.parameters()).shape[1] if not hasattr(layer, "groups") else layer.in_channels
    small, usual = torch.randn(2, channels, *size), torch.randn(2, channels, *[9 for _ in size])
    model = nn.Sequential(layer).eval()
    with pytest.raises(RuntimeError):
        model(small)
    prepared = qcore.prepare_fx(
        model, qcore.get_default_qconfig_mapping(installed_backend), (usual,), on_unsupported="ignore"
    )
    with torch.no_grad():
        prepared(usual)
        converted = qcore.convert_fx(prepared)
        for _ in range(3):
            with pytest.raises((RuntimeError, ShapeError)):
                converted(small)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [nn.Linear(8, 4), nn.Conv2d(8, 4, 3), nn.Conv2d(8, 8, 3, groups=8)], ids=str)
def test_a_weight_that_is_no_number_is_refused_by_name(installed_backend: str, layer: nn.Module, value: float):
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 5, 5)
    prepared = qcore.prepare_fx(
        model, qcore.get_default_qconfig_mapping(installed_backend), (x,), on_unsupported="ignore"
    )
    prepared(x)
    with torch.no_grad():
        prepared.get_parameter("0.weight").view(-1)[3] = value
    with pytest.raises(qcore.errors.ConfigError, match="the weight 0.weight holds NaN or infinity"):
        qcore.convert_fx(prepared)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bias_that_is_no_number_gives_what_the_reference_gives(installed_backend: str, value: float):
    for layer, x in ((nn.Linear(8, 4), torch.randn(2, 8)), (nn.Conv2d(8, 4, 3), torch.randn(2, 8, 5, 5))):
        prepared = qcore.prepare_fx(
            nn.Sequential(layer, nn.ReLU6()).eval(), qcore.get_default_qconfig_mapping(installed_backend), (x,)
        )
        with torch.no_grad():
            prepared(x)
            prepared.get_parameter("0.bias")[1] = value
            reference, converted = qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)
            kept = [0, 1, 2, 3] if value == value else [0, 2, 3]  # No integer stands for NaN.
            assert torch.equal(converted(x)[:, kept], reference(x)[:, kept])
        decisions = qcore.explain(converted).quantized
        assert installed_backend == "reference" or any("bias holds NaN" in d.reason for d in decisions)
