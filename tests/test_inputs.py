"""Inputs and models in other dtypes, on other devices, or not tensors at all."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import qcore
from qcore.errors import GuardError
from tests.native import kernels_of
from tests.stages import STAGES, Small, made

EXACT = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
OTHERS = pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool])


class Python(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Small()

    def forward(self, features: Tensor) -> Tensor:
        result = self.part(features)
        return -result if result.sum() > 1e9 else result


@EXACT
@pytest.mark.parametrize("stage", ["reference", "converted"])
@torch.no_grad()
def test_half_precision_is_cast_which_loses_nothing_and_gives_float32(
    installed_backend: str, stage: str, dtype: torch.dtype
) -> None:
    for model in (made(stage, installed_backend), made(stage, installed_backend, Python())):
        x = torch.randn(6, 8).to(dtype)
        for _ in range(4):
            assert torch.equal(model(x), model(x.float()))
            assert model(x).dtype == torch.float32


@EXACT
@torch.no_grad()
def test_a_layer_with_its_range_at_run_time_casts_as_well(installed_backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 8)
    mapping = qcore.QConfigMapping().set_global(qcore.default_dynamic_qconfig)
    prepared = qcore.prepare_fx(nn.Sequential(nn.Linear(8, 8)).eval(), mapping, (x,), backend=installed_backend)
    for model in (qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)):
        assert torch.equal(model(x.to(dtype)), model(x.to(dtype).float()))
        with pytest.raises(GuardError, match=r"argument input of Sequential: a tensor of torch\.float64"):
            model(x.double())


@OTHERS
@STAGES
@torch.no_grad()
def test_what_a_cast_could_change_is_refused_by_name(installed_backend: str, stage: str, dtype: torch.dtype) -> None:
    message = f"argument features of Small: a tensor of {dtype}; the model was prepared with a tensor of torch.float32"
    for model in (made(stage, installed_backend), made(stage, installed_backend, Python())):
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for _ in range(3):
                with pytest.raises(GuardError, match=message):
                    copied(features=torch.ones(6, 8).to(dtype))


@STAGES
@pytest.mark.parametrize("how", ["half", "bfloat16", "double"])
@torch.no_grad()
def test_a_change_of_dtype_leaves_the_scales_and_the_graph_as_they_are(
    installed_backend: str, stage: str, how: str
) -> None:
    for model in (made(stage, installed_backend), made(stage, installed_backend, Python())):
        x = torch.randn(6, 8)
        wanted, state = copy.deepcopy(model)(x), copy.deepcopy(model.state_dict())
        for changed in (getattr(model, how)(), model.to(getattr(torch, how)), nn.Sequential(model).type(torch.half)):
            for _ in range(3):
                assert torch.equal(changed(x), wanted)
        for name, value in model.state_dict().items():
            assert value.dtype == state[name].dtype and (stage == "prepared" or torch.equal(value, state[name]))


@torch.no_grad()
def test_a_kernel_by_itself_keeps_its_scales(installed_backend: str) -> None:
    for kernel in kernels_of(made("converted", installed_backend)):
        state = copy.deepcopy(kernel.state_dict())
        for name, value in kernel.half().state_dict().items():
            assert value.dtype == state[name].dtype and torch.equal(value, state[name])


@torch.no_grad()
def test_autocast_reaches_the_float_operators_only(installed_backend: str) -> None:
    for stage in ("reference", "converted"):
        model, x = made(stage, installed_backend), torch.randn(6, 8)
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                found = model(x)
                assert (found.float() - wanted).abs().max() < 0.1
        for _ in range(3):
            assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_autocast_while_calibrating(installed_backend: str) -> None:
    prepared, x = made("prepared", installed_backend), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        qcore.calibrate(prepared, [(x,)])
    assert qcore.convert_fx(prepared)(x).dtype == torch.float32


def test_a_float_model_beside_takes_what_the_graph_refuses(installed_backend: str) -> None:
    custom = qcore.PrepareCustomConfig().set_guard_failure("float")
    model = made("converted", installed_backend, nn.Sequential(nn.Linear(8, 8)), custom)
    x = torch.randn(6, 8)
    assert torch.equal(model.half()(x), model.model(x))
    with pytest.raises(RuntimeError, match="dtype") as caught:  # The float model's own error, after the graph's.
        model(x.double())
    assert isinstance(caught.value.__context__, GuardError)
