"""Gradients: straight through the roundings of a reference model; an error on kernels, when one is asked for."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import qcore
from qcore import ops
from qcore.errors import NotSupportedError
from tests.native import kernels_of


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Headed(nn.Module):
    """Float before the integers and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.body, self.after = nn.LayerNorm(8), Residual(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x)))


def prepared(model: nn.Module, backend: str, custom: Any = None) -> nn.Module:
    x = torch.randn(16, 8)
    made = qcore.prepare_fx(model.eval(), qcore.get_default_qconfig_mapping(backend), (x,), custom)
    qcore.calibrate(made, [(x,)])
    return made


def converted(model: nn.Module, backend: str, custom: Any = None) -> nn.Module:
    if backend == "reference":
        pytest.skip("it has no kernels")
    return qcore.convert_fx(prepared(model, backend, custom))


RANGES = pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 255, torch.uint8), (-128, 127, torch.int8), (10, 90, torch.uint8)]
)


@RANGES
def test_a_rounding_has_the_gradient_of_torchs_fake_quantization(low: int, high: int, dtype: torch.dtype) -> None:
    scale, zero_point = torch.tensor(0.05), torch.tensor(20)
    x = (torch.randn(4000) * 6).requires_grad_()
    with torch.no_grad():  # Where a value is cut off exactly, too.
        x[:6] = torch.tensor([low - 20.6, low - 20.4, high - 19.6, high - 19.4, float("inf"), float("nan")]) * 0.05
    weights = torch.randn(4000)
    quantized = ops.quantize_per_tensor(x, scale, zero_point, low, high, dtype)
    result = ops.dequantize_per_tensor(quantized, scale, zero_point)
    passed = ops.straight_through(result, x, scale, zero_point, low, high)
    assert torch.equal(passed, result)
    (found,) = torch.autograd.grad((passed * weights).sum(), x)
    fake = torch.fake_quantize_per_tensor_affine(x, 0.05, 20, low, high)
    (wanted,) = torch.autograd.grad((fake * weights).sum(), x)
    assert torch.equal(found[:5], wanted[:5]) and torch.equal(found[6:], wanted[6:])
    assert found[5] == 0 and 0 < (found == 0).sum() < 4000


def test_a_range_taken_at_run_time_has_the_gradient_of_its_input() -> None:
    x = torch.randn(300, requires_grad=True)
    weights = torch.randn(300)
    (found,) = torch.autograd.grad((ops.dynamic_quantize_dequantize(x, 0, 255) * weights).sum(), x)
    qparams = ops.dynamic_qparams(x.detach(), 0, 255)
    fake = torch.fake_quantize_per_tensor_affine(x, float(qparams[0]), int(qparams[1]), 0, 255)
    (wanted,) = torch.autograd.grad((fake * weights).sum(), x)
    assert torch.equal(found, wanted) and found.abs().sum() > 0


def test_a_reference_model_has_nearly_the_gradients_of_the_float_model(installed_backend: str) -> None:
    model = Headed()
    reference = qcore.convert_to_reference_fx(prepared(model, installed_backend))
    with torch.no_grad():
        plain = reference(x := torch.randn(16, 8))
    assert torch.equal(reference(x), plain)
    wanted, found = (jacobian(lambda x, m=m: m(x).sum(0), x) for m in (model, reference))
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    for m in (model, reference):
        m.zero_grad()
        (m(x) ** 2).sum().backward()
    wanted_of, found_of = dict(model.named_parameters()), dict(reference.named_parameters())
    assert {"before.weight", "after.bias", "body.first.bias"} <= set(found_of)
    for name, parameter in found_of.items():
        assert (parameter.grad - wanted_of[name].grad).norm() < 0.1 * wanted_of[name].grad.norm() + 1e-3, name
    assert torch.equal(copy.deepcopy(reference)(x), plain)


def test_the_gradient_of_a_sum_with_quantized_layers_is_not_that_of_the_other_summand(installed_backend: str) -> None:
    model = Residual()
    reference = qcore.convert_to_reference_fx(prepared(model, installed_backend))
    x = torch.randn(64, 8) * 0.5  # Within the range.
    ones, wanted, found = (jacobian(lambda x, m=m: m(x).sum(0), x) for m in (nn.Identity(), model, reference))
    assert (found - wanted).norm() < 0.2 * (wanted - ones).norm()


def test_a_reference_model_has_derivatives_for_torch_func(installed_backend: str) -> None:
    reference = qcore.convert_to_reference_fx(prepared(Residual(), installed_backend)).requires_grad_(False)
    x, tangent = torch.randn(16, 8), torch.randn(16, 8)
    gradient = torch.func.grad(lambda x: (reference(x) * tangent).sum())(x)
    x.requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad((reference(x) * tangent).sum(), x)[0])
    result, forward = torch.func.jvp(reference, (x.detach(),), (tangent,))
    assert torch.equal(result, reference(x))
    assert torch.allclose((forward * tangent).sum(), (gradient * tangent).sum(), rtol=1e-4)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of the result": lambda result, x: result.sum(),
    "of a sum with the input": lambda result, x: (result + x).sum(),
    "of what is changed in place": lambda result, x: result.add_(1).relu_().sum(),
    "of a view": lambda result, x: result[:2].t().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", [Residual, Headed])
def test_a_gradient_through_kernels_is_an_error_when_it_is_asked_for(
    installed_backend: str, model: type[nn.Module], loss: str
) -> None:
    quantized = converted(model(), installed_backend).requires_grad_(False)
    x = torch.randn(16, 8)
    with torch.no_grad():
        wanted = quantized(x)
    x.requires_grad_()
    for _ in range(4):
        result = quantized(x)
        assert torch.equal(result, wanted)
        total = LOSSES[loss](result, x)
        with pytest.raises(NotSupportedError, match=r"integers have none.*convert_to_reference_fx"):
            total.backward()
        assert x.grad is None
        with pytest.raises(NotSupportedError, match="integers have none"):
            torch.func.grad(lambda x: LOSSES[loss](quantized(x), x))(x.detach())
    with torch.no_grad():
        assert torch.equal(quantized(x), wanted)


def test_a_host_that_is_trained_around_kernels_gets_the_error(installed_backend: str) -> None:
    quantized = converted(Residual(), installed_backend)
    quantized.requires_grad_(False)
    below, above = nn.Linear(8, 8), nn.Linear(8, 2)
    x = torch.randn(16, 8)
    for _ in range(3):
        above(quantized(x)).sum().backward()  # Features of a frozen model, and a head that is trained.
    assert above.weight.grad.abs().sum() > 0
    with pytest.raises(NotSupportedError, match="integers have none"):
        above(quantized(below(x))).sum().backward()
    with pytest.raises(NotSupportedError, match="integers have none"):
        (below(x) + quantized(below(x))).sum().backward()


def test_float_layers_behind_all_integers_keep_their_gradients(installed_backend: str) -> None:
    quantized = converted(Headed(), installed_backend)
    head = quantized.get_submodule("after")
    x = torch.randn(16, 8)
    with pytest.raises(NotSupportedError, match=r"requires_grad_\(False\) on what comes before them"):
        quantized(x).sum().backward()
    quantized.requires_grad_(False)
    head.requires_grad_(True)
    weights = torch.randn(16, 8)
    for _ in range(3):
        for parameter in head.parameters():
            parameter.grad = None
        (quantized(x) * weights).sum().backward()
        assert torch.allclose(dict(head.named_parameters())["bias"].grad, weights.sum(0), atol=1e-5)
        assert dict(head.named_parameters())["weight"].grad.abs().sum() > 0


def test_an_input_that_meets_no_integers_keeps_its_gradient(installed_backend: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Residual()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.body(x) * torch.sin(y)

    if installed_backend == "reference":
        pytest.skip("it has no kernels")
    x, y = torch.randn(16, 8), torch.randn(16, 8, requires_grad=True)
    mapping = qcore.get_default_qconfig_mapping(installed_backend).set_object_type(operator.mul, None)
    made = qcore.prepare_fx(Two().eval(), mapping, (x, y.detach()))
    qcore.calibrate(made, [(x, y.detach())])
    quantized = qcore.convert_fx(made)
    for _ in range(3):
        y.grad = None
        result = quantized(x, y)
        result.sum().backward()
        with torch.no_grad():
            body = quantized(x, torch.full_like(y, torch.pi / 2))
        assert torch.allclose(y.grad, body * torch.cos(y), atol=1e-5)
    x.requires_grad_()
    with pytest.raises(NotSupportedError, match="integers have none"):
        quantized(x, y).sum().backward()


def test_nobody_who_wants_no_gradient_gets_an_error(installed_backend: str) -> None:
    """Parameters need gradients by default, and ``torch.no_grad`` is easily forgotten."""
    quantized = converted(Headed(), installed_backend)
    x = torch.randn(16, 8)
    with torch.no_grad():
        wanted = quantized(x)
    for _ in range(4):
        assert torch.equal(quantized(x), wanted)
        assert torch.equal(quantized(x.clone().requires_grad_()), wanted)
    with torch.inference_mode():
        assert torch.equal(quantized(x), wanted)


@pytest.mark.parametrize("kind", ["parts", "float beside"])
def test_models_in_parts_and_with_a_float_one_beside_them_do_the_same(installed_backend: str, kind: str) -> None:
    class Python(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Residual(), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.head(y) if y.sum() < 1e9 else y

    custom = qcore.PrepareCustomConfig().set_guard_failure("float") if kind == "float beside" else None
    quantized = converted(Python() if kind == "parts" else Residual(), installed_backend, custom)
    x = torch.randn(16, 8, requires_grad=True)
    result = quantized(x)
    with pytest.raises(NotSupportedError, match="integers have none"):
        result.sum().backward()


def test_a_kernel_from_float_to_float_gives_the_error_by_itself(installed_backend: str) -> None:
    if installed_backend == "reference":
        pytest.skip("it has no kernels")
    x = torch.randn(16, 8)
    mapping = qcore.QConfigMapping().set_global(qcore.default_dynamic_qconfig)
    made = qcore.prepare_fx(nn.Sequential(nn.Linear(8, 8)).eval(), mapping, (x,), backend=installed_backend)
    quantized = qcore.convert_fx(made)
    (kernel,) = kernels_of(quantized)
    x.requires_grad_()
    for module in (kernel, quantized):
        with pytest.raises(NotSupportedError, match="integers have none"):
            (x + module(x)).sum().backward()
