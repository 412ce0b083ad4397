"""The ends of 32-bit sums and of float32: which weights and scales a rule declines, and what a loaded weight meets."""

import pytest
import torch
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.sums import could_overflow, largest_sums, why_inexact
from torch import Tensor, nn

import qcore
from qcore.errors import LoweringError
from qcore.lowering import QParams, QuantizedWeight
from qcore.testing import steps_apart

#: Products of 255 and 127 that int32 holds, and one more.
MOST = (2**31 - 1) // (255 * 127)


def test_the_largest_sum_of_a_channel_is_that_of_one_sign():
    weight = torch.tensor([[100, -3, 27], [-128, -127, 5]], dtype=torch.int8)
    assert largest_sums(weight).tolist() == [127, 255]
    assert largest_sums(weight, axis=1).tolist() == [128, 130, 32]


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_overflow_from_one_product_on(sign: int):
    weight = torch.full((2, MOST + 1), 127 * sign, dtype=torch.int8)
    assert could_overflow(weight)
    assert not could_overflow(weight, input_max=127)
    weight[:, 0] = 0
    assert not could_overflow(weight)
    assert could_overflow(torch.full((MOST + 1, 2), 127 * sign, dtype=torch.int8), axis=1)
    # Positive and negative weights aren't added up: inputs may meet one sign only.
    weight[:, ::2] *= -1
    assert not could_overflow(weight)


def linear(
    scale: float, weight_scale: list[float], output: float | None, bias: float = 0.0, **options: bool
) -> str | None:
    weight = QuantizedWeight(
        torch.full((len(weight_scale), 8), 100, dtype=torch.int8), torch.tensor(weight_scale), torch.tensor([0]), 0
    )
    qparams = QParams(scale, 128, 0, 255, torch.uint8)
    result = None if output is None else QParams(output, 128, 0, 255, torch.uint8)
    return why_inexact(weight, torch.full((len(weight_scale),), bias), qparams, result, **options)


def test_usual_scales_are_no_reason():
    assert linear(0.02, [1e-3, 1e-9], 0.1, bias=3.0) is None
    assert linear(1e-20, [1e-3], 1e-22) is None
    assert linear(1e20, [1e-3], None) is None


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ((1e-37, [1e-3], 1e-38), "end of float32's range"),
        ((1e-20, [1e-18], 1e-30), "end of float32's range"),
        ((1e37, [1e-3], None), "end of float32's range"),
        ((1.0, [1.0, 1e-38], 1.0), "end of float32's range"),
        ((1e-20, [1.0], 1e20), "end of float32's range"),
        ((1.0, [1.0], 1e-5), "too many of its output's steps"),  # 8 * 100 * 255 / 1e-5 steps.
        ((0.02, [1e-3], 1e-5, 1e5), "too many of its output's steps"),
        ((0.02, [1e-3], 0.1, float("nan")), "NaN or infinity"),
        ((0.02, [1e-3], None, float("-inf")), "NaN or infinity"),
    ],
)
def test_what_passes_an_end_is_a_reason(scales: tuple, reason: str):
    assert reason in str(linear(*scales))


def test_a_bias_that_is_added_to_the_sums_must_fit_them():
    assert linear(0.02, [1e-3, 1e-9], 0.1, bias=1.0) is None
    assert linear(0.02, [1e-3, 1e-8], 0.1, bias=0.4, adds_bias=True) is None
    assert "32 bits" in str(linear(0.02, [1e-3, 1e-9], 0.1, bias=1.0, adds_bias=True))
    assert "larger than its output's" in str(linear(0.02, [1e-3], 1e-5, bias=1e-3, adds_bias=True))


def converted(backend: str, model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    mapping = qcore.get_default_qconfig_mapping(backend)
    prepared = qcore.prepare_fx(model.eval(), mapping, (x,), backend=backend)
    prepared(x)
    return qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_that_leave_32_bits_are_left_to_float(installed_backend: str, sign: int):
    layer = nn.Linear(70_000, 2)
    nn.init.constant_(layer.weight, 0.01 * sign)
    x = torch.ones(2, 70_000)
    reference, model = converted(installed_backend, nn.Sequential(layer, nn.ReLU6()), x)
    assert steps_apart(reference, reference(x), model(x))[0] <= 1.01
    (decision,) = [d for d in qcore.explain(model).quantized if "linear" in d.operators]
    # Where pairs of products are limited, the weights are half as large.
    assert installed_backend == "reference" or decision.kernel or "32 bits" in decision.reason


def test_many_inputs_alone_are_no_reason(installed_backend: str):
    x = torch.randn(2, 70_000)
    reference, model = converted(installed_backend, nn.Sequential(nn.Linear(70_000, 2)), x)
    assert steps_apart(reference, reference(x), model(x))[0] <= 1.01
    (decision,) = qcore.explain(model).quantized
    assert installed_backend == "reference" or (decision.kernel and not decision.reason)


def test_a_loaded_weight_whose_sums_leave_32_bits_is_refused(installed_backend: str):
    x = torch.randn(2, 70_000)
    _, model = converted(installed_backend, nn.Sequential(nn.Linear(70_000, 2)), x)
    state = model.state_dict()
    if not any(isinstance(module, KernelModule) for module in model.modules()):
        pytest.skip("no kernels")
    (name,) = [name for name in state if name.endswith(".weight")]
    model.load_state_dict({**state, name: torch.full_like(state[name], 127)})
    with pytest.raises((LoweringError, qcore.errors.BackendUnavailableError), match="weight"):
        model(x)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("part", ["input", "weight", "both"])
def test_weights_and_inputs_of_any_size(installed_backend: str, part: str, size: float):
    size = min(size, 1e15) if part == "both" else size
    for layer, shape in ((nn.Linear(16, 8), (4, 16)), (nn.Conv2d(4, 8, 3), (2, 4, 6, 6))):
        x = torch.randn(shape)
        with torch.no_grad():
            if part != "input":
                layer.weight.mul_(size)
            if part != "weight":
                x = x * size
            model = nn.Sequential(layer, nn.ReLU(), nn.Flatten())
            reference, kernels = converted(installed_backend, model, x)
            assert steps_apart(reference, reference(x), kernels(x))[0] <= 1.01


@pytest.mark.parametrize("zero", ["input", "weight", "channel", "all"])
def test_calibration_on_zeros(installed_backend: str, zero: str):
    for layer, shape in ((nn.Linear(16, 8), (4, 16)), (nn.Conv2d(4, 8, 3), (2, 4, 6, 6))):
        x = torch.zeros(shape) if zero in ("input", "all") else torch.randn(shape)
        with torch.no_grad():
            if zero in ("weight", "all"):
                layer.weight.zero_()
            if zero == "channel":
                layer.weight[3].zero_()
                layer.bias[3] = 0
            if zero == "all":
                layer.bias.zero_()
            reference, model = converted(installed_backend, nn.Sequential(layer, nn.ReLU()), x)
            expected, found = reference(x), model(x)
        assert steps_apart(reference, expected, found)[0] <= 1.01
        assert bool(torch.isfinite(found).all())
        assert zero != "channel" or not found[:, 3].any()
        assert zero != "all" or not found.any()
