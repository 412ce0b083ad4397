"""What stands around the calls of what a verb returns: an error names the argument that it is about."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcore.errors import GuardError, NotSupportedError, QcoreError
from qcore.fx.calls import as_written, threads_as_written
from tests.stages import STAGES, made


@STAGES
@torch.no_grad()
@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "None"), ([[1.0] * 8], "a list"), (1.5, "a float"), (torch.ones(1, 8).numpy(), "a ndarray")],
)
def test_what_is_no_tensor_is_refused_by_name(installed_backend: str, stage: str, value: Any, kind: str) -> None:
    model = made(stage, installed_backend)
    for _ in range(3):
        with pytest.raises(
            GuardError, match=f"argument features of Small: {kind}; the model was prepared with a tensor"
        ):
            model(value)
    assert model(torch.randn(6, 8)).shape == (6, 4)


@STAGES
def test_other_errors_stay_what_they_are(installed_backend: str, stage: str) -> None:
    model = made(stage, installed_backend)
    with pytest.raises(TypeError, match="argument"):
        model()
    with pytest.raises((RuntimeError, QcoreError)) as caught:
        model(torch.randn(6, 9))
    assert not isinstance(caught.value, GuardError)


def test_a_dtype_that_the_models_own_code_takes_is_none_of_qcores_business(installed_backend: str) -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x / 255)

    model = made("converted", installed_backend, Images())
    pixels = torch.randint(0, 256, (6, 8), dtype=torch.uint8)
    assert torch.equal(model(pixels), model(pixels.float()))


@torch.no_grad()
def test_a_model_on_the_meta_device_has_no_data_until_it_is_loaded(installed_backend: str) -> None:
    model, x = made("converted", installed_backend), torch.randn(6, 8)
    wanted, state = model(x), copy.deepcopy(model.state_dict())
    for _ in range(3):
        with pytest.raises(QcoreError, match=r"argument features of Small: a tensor of torch\.float32 on meta; the"):
            copy.deepcopy(model)(x.to("meta")) if installed_backend != "reference" else pytest.skip("it gives shapes")
    empty = model.to("meta")
    with pytest.raises(NotSupportedError, match=r"Small is on the meta device.*load_state_dict\(state, assign=True\)"):
        empty(x.to("meta"))
    empty.load_state_dict(state, assign=True)
    for _ in range(3):
        assert torch.equal(empty(x), wanted)


def test_models_run_as_written_in_the_thread_that_asks_and_until_the_outermost_ends() -> None:
    mine = threading.get_ident()
    seen: list[bool] = []
    with pytest.raises(KeyError), as_written():
        with as_written():
            assert mine in threads_as_written
        assert mine in threads_as_written
        thread = threading.Thread(target=lambda: seen.append(threading.get_ident() in threads_as_written))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [False] and mine not in threads_as_written


def test_a_forward_that_a_user_puts_in_its_place_is_called(installed_backend: str) -> None:
    model, x = made("converted", installed_backend), torch.randn(6, 8)
    model(x)
    model.forward = lambda x: "the user's"  # type: ignore[method-assign, assignment]
    assert model(x) == "the user's"
    del model.forward
    assert model(x).shape == (6, 4)


@STAGES
def test_hooks_of_the_user_s_run_at_every_call(installed_backend: str, stage: str) -> None:
    model, x, seen = made(stage, installed_backend), torch.randn(6, 8), []
    for _ in range(4):
        model(x)
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape) or output * 0)
    for _ in range(4):
        assert not model(x).any()
    assert seen == [(6, 4)] * 4
