"""The suite for backends on this library: what can't be replayed is found, beside what the core's suite finds."""

import pytest
import torch
from qcore_torch_kernels.graph import lower, replayed_kinds
from qcore_torch_kernels.testing import TorchKernelsConformance
from torch import nn

import qcore
from qcore.testing import CASES, FakeBackend, plugged_in

REPEATED = "test_calls_of_one_kind_compute_the_same_bits"


class Watched(nn.Module):
    """A kernel, and something that is done at its call."""

    replayable = True

    def __init__(self, kernel, call):
        super().__init__()
        self.kernel, self.call = kernel, call

    def forward(self, *inputs):
        return self.call(self.kernel, *inputs)


class OnTheLibrary(FakeBackend):
    """The fake backend, whose kernels promise that they can be recorded."""

    name = "toy"
    promise = True

    def called(self, kernel, *inputs):
        return kernel(*inputs)

    def promised(self, made):
        for module in made.modules():
            module.replayable = self.promise
        return made

    def kernel(self, call):
        return Watched(self.promised(super().kernel(call)), self.called)

    def enter(self, qparams):
        return self.promised(super().enter(qparams))

    def leave(self, qparams):
        return self.promised(super().leave(qparams))

    def lower(self, model):
        return lower(model, self.rules(), enter=self.enter, leave=self.leave)


class ReadsData(OnTheLibrary):
    def called(self, kernel, *inputs):
        return kernel(*inputs) if int(inputs[0].flatten()[0]) >= 0 else inputs[0]


class GivesTheLastResult(OnTheLibrary):
    def called(self, kernel, *inputs):
        result, last = kernel(*inputs), vars(kernel).get("last")
        vars(kernel)["last"] = result
        return result if last is None or last.shape != result.shape else last


class PromisesNothing(OnTheLibrary):
    promise = False


class SaysSo(TorchKernelsConformance):
    backend = "toy"
    replays = False


class Replays(TorchKernelsConformance):
    backend = "toy"


def check(suite, toy, name):
    torch.manual_seed(0)
    with plugged_in("toy", toy.plugin()):
        getattr(suite(), REPEATED)(next(case for case in CASES if case.name == name))
    suite._prepared.clear()  # The next toy's name is the same.


@pytest.mark.parametrize("name", ["conv2d 3x3", "add", "gru_cell", "cat with a clamped convolution"])
def test_a_sound_backend_passes(name):
    check(Replays, OnTheLibrary(), name)
    check(SaysSo, PromisesNothing(), name)


@pytest.mark.parametrize("fault", [ReadsData, GivesTheLastResult, PromisesNothing])
@pytest.mark.parametrize("name", ["conv2d 3x3", "add"])
def test_a_fault_is_found(fault, name):
    with pytest.raises((AssertionError, RuntimeError)):
        check(Replays, fault(), name)


def test_a_backend_that_replays_does_not_say_that_it_does_not():
    with pytest.raises(AssertionError):
        check(SaysSo, OnTheLibrary(), "conv2d 3x3")


def test_a_model_whose_parameters_want_gradients_is_replayed_for_who_wants_none():
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)).eval(), torch.randn(16, 8)
    with plugged_in("toy", OnTheLibrary().plugin()):
        prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping("toy"), (x,))
        prepared(x)
        converted = qcore.convert_fx(prepared)
    wanted = converted(x)
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(converted(x), wanted)
        assert torch.equal(converted(x.clone().requires_grad_()), wanted)
    assert any(parameter.requires_grad for parameter in converted.parameters()) and replayed_kinds(converted) >= 1
