"""The state of converted models: all that depends on weights or data is in it, and whatever changes it is heard."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from qcore_torch_kernels.kernel import KernelModule
from torch import nn

import qcore
from qcore.lowering import QParams

IMAGE = (2, 4, 7, 9)


class Model(nn.Module):
    """A function of some modules and an input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def layers(function, *names):
    return lambda: Model(function, **{name: nn.Conv2d(4, 4, 1) for name in names})


def converted(build, backend, seed=0, size=1.0, offset=0.0, shape=IMAGE):
    torch.manual_seed(seed)
    model = build().eval()
    x = size * torch.randn(shape) + offset
    mapping = qcore.get_default_qconfig_mapping(backend)
    prepared = qcore.prepare_fx(model, mapping, (x,), backend=backend, on_unsupported="ignore")
    qcore.calibrate(prepared, [x, 0.9 * x])
    return qcore.convert_fx(prepared)


def interpolated(m, x):
    return m.b(F.interpolate(F.relu6(m.a(x)), scale_factor=2.0))


CHAINS = {
    "clamps of one range": layers(lambda m, x: torch.cat([F.relu6(m.a(x)), m.b(x)], 1), "a", "b"),
    "clamps of two ranges": layers(lambda m, x: m.c(F.relu(m.a(x)) + F.hardtanh(m.b(x), -0.4, 0.3)), "a", "b", "c"),
    "clamps in a row": layers(lambda m, x: m.b(F.relu6(m.a(x)).clamp(0.2, 0.7).clamp(max=0.6)), "a", "b"),
    "clamps apart": layers(lambda m, x: m.b(m.a(x).clamp(0, 0.2).clamp(0.3, 0.7) + m.b(x)), "a", "b"),
    "a clamp on integers": layers(lambda m, x: (y := m.a(x), m.b(y) + m.c(y.clamp(-0.2, 0.4)))[1], "a", "b", "c"),
    "a clamped sum": layers(lambda m, x: m.c(F.relu6(m.a(x) + m.b(x))), "a", "b", "c"),
    "a clamped product": layers(lambda m, x: m.c((m.a(x) * m.b(x)).clamp(-0.1, 0.2)), "a", "b", "c"),
    "padding": layers(lambda m, x: m.b(F.pad(m.a(x), (1, 2, 0, 1))), "a", "b"),
    "padding of clamps": layers(
        lambda m, x: m.b(torch.cat([F.pad(F.relu(m.a(x)), (1, 1)), F.pad(m.b(x), (1, 1))], 0)), "a", "b"
    ),
    "interpolation": layers(interpolated, "a", "b"),
    "a function": layers(lambda m, x: m.b(F.elu(m.a(x))) + torch.sigmoid(m.b(x)), "a", "b"),
}


@torch.no_grad()
@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_twin_that_was_calibrated_otherwise_becomes_the_same(chain, calls, installed_backend):
    source = converted(CHAINS[chain], installed_backend)
    x = 3 * torch.randn(IMAGE)
    expected = source(x)
    for assign in (False, True):
        twin = converted(CHAINS[chain], installed_backend, seed=1, size=7.0, offset=0.5)
        before = [twin(x) for _ in range(calls)]
        assert not any(torch.equal(result, expected) for result in before)
        twin.load_state_dict(source.state_dict(), assign=assign)
        for _ in range(4):
            assert torch.equal(twin(x), expected)


def linear(bias=True):
    return nn.Sequential(nn.Linear(8, 8, bias), nn.ReLU(), nn.Linear(8, 4))


def kernels_of(model):
    return [module for module in model.modules() if isinstance(module, KernelModule)]


def first_kernel(model):
    return next(kernel for kernel in kernels_of(model) if "weight" in kernel._buffers)


def written_through_state_dict(kernel, new):
    kernel.state_dict()["weight"].copy_(new)


def written_in_inference_mode(kernel, new):
    with torch.inference_mode():
        kernel.weight.copy_(new)


CHANGES = {
    "written in place": lambda kernel, new: kernel.weight.copy_(new),
    "written through a view": lambda kernel, new: kernel.weight.view(-1)[:].copy_(new.view(-1)),
    "written through a state_dict": written_through_state_dict,
    "written in inference mode": written_in_inference_mode,
    "assigned": lambda kernel, new: setattr(kernel, "weight", new),
    "assigned as a Parameter": lambda kernel, new: setattr(kernel, "weight", nn.Parameter(new, requires_grad=False)),
    "registered": lambda kernel, new: kernel.register_buffer("weight", new),
    "put among the buffers": lambda kernel, new: kernel._buffers.__setitem__("weight", new),
    "buffers updated": lambda kernel, new: kernel._buffers.update({"weight": new}),
    "loaded": lambda kernel, new: kernel.load_state_dict({**kernel.state_dict(), "weight": new}),
    "assigned on loading": lambda kernel, new: kernel.load_state_dict(
        {**kernel.state_dict(), "weight": new}, assign=True
    ),
    "past what torch counts, and told": lambda kernel, new: (kernel.weight.data.copy_(new), kernel.unpack()),
}


@torch.no_grad()
@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("how", CHANGES)
def test_whatever_changes_a_weight_is_heard(how, calls, installed_backend):
    if installed_backend == "reference":
        pytest.skip("it has no kernels")
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    fresh = copy.deepcopy(model)
    new = first_kernel(model).weight.flip(0).clone()
    fresh.load_state_dict({name: new if value.equal(first_kernel(model).weight) else value.clone()
                           for name, value in model.state_dict().items()})  # fmt: skip
    expected = fresh(x)
    for _ in range(calls):
        assert not torch.equal(model(x), expected)
    CHANGES[how](first_kernel(model), new)
    for _ in range(4):
        assert torch.equal(model(x), expected)
    CHANGES[how](
        first_kernel(model), first_kernel(model).weight.flip(0).clone()
    )  # And once more, now that it is packed.
    for _ in range(4):
        assert not torch.equal(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bias", "weight_scale", "output_scale", "output_zero_point", "input_scale"])
def test_each_tensor_of_the_state_is_heard(name, installed_backend):
    """As all that a model is saved with and that it reads."""
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    with_it = [kernel for kernel in kernels_of(model) if kernel._buffers.get(name) is not None]
    if not with_it or (installed_backend == "qnnpack" and name == "input_scale"):
        pytest.skip("this backend's kernels have no such tensor, or take it from their input")
    kernel = next((kernel for kernel in with_it if "weight" in kernel._buffers), with_it[0])
    for _ in range(4):
        before = model(x)
    value = kernel._buffers[name]
    value.add_(1) if value.dtype == torch.int64 else value.mul_(1.5)
    after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, pickle.loads(pickle.dumps(model))(x))


@torch.no_grad()
def test_what_was_assigned_is_a_copy(installed_backend):
    """A write into the tensor that was given would be counted there, so it must not be the kernel's."""
    if installed_backend == "reference":
        pytest.skip("it has no kernels")
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    given = first_kernel(model).weight.flip(0).clone()
    first_kernel(model).weight = given
    expected = model(x)
    given.zero_()
    assert torch.equal(model(x), expected)
    assert first_kernel(model).weight.any()


@torch.no_grad()
def test_a_state_that_was_lent_for_a_call_is_given_back(installed_backend):
    """As ``torch.func.functional_call`` does it: past ``__setattr__``."""
    if installed_backend == "reference":
        pytest.skip("it has no kernels")
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    other = converted(linear, installed_backend, seed=1, size=5.0, shape=(5, 8))
    lent, kept = dict(other.state_dict()), first_kernel(model).weight
    for _ in range(3):
        expected = model(x)
        assert torch.equal(torch.func.functional_call(model, lent, (x,)), other(x))
        assert torch.equal(model(x), expected)
    assert first_kernel(model).weight is kept
    kept.zero_()
    assert not torch.equal(model(x), expected)


@torch.no_grad()
def test_the_kernels_of_a_model_are_looked_after_together(installed_backend):
    """One number tells whether any of a model's kernels changed; copies have one of their own."""
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    expected = model(x)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len({id(kernel.state_counter) for kernel in kernels_of(copied)}) == min(1, len(kernels_of(copied)))
        if copied is not model:
            assert torch.equal(copied(x), expected)
            for value in copied.state_dict().values():
                if value.dtype == torch.int8:
                    value.zero_()
            assert not torch.equal(copied(x), expected)
            assert torch.equal(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("saved", ["deepcopy", "pickle", "torch.save"])
def test_what_is_packed_is_never_copied(saved, calls, installed_backend):
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    for _ in range(calls):
        model(x)
    for kernel in kernels_of(model):
        if "weight" in kernel._buffers:
            kernel.weight.copy_(kernel.weight.flip(0))  # What was packed is of yesterday.
    file = io.BytesIO()
    if saved == "deepcopy":
        copied = copy.deepcopy(model)
    elif saved == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert all(kernel._packed == (-1, None) for kernel in kernels_of(copied))
    assert torch.equal(copied(x), model(x))
    assert list(copied.state_dict()) == list(model.state_dict())


class Slow(KernelModule):
    """A kernel during whose packing something happens."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))
        self.meanwhile = lambda: None

    def pack(self):
        factor = float(self.factor)
        self.meanwhile()
        return lambda x: x * factor


def test_a_state_that_is_loaded_while_another_thread_packs_is_packed_next():
    kernel = Slow()
    kernel.register_load_state_dict_post_hook(lambda *_: loaded.set())
    loaded = threading.Event()

    def load():
        thread = threading.Thread(target=kernel.load_state_dict, args=({"factor": torch.tensor(-3.0)},))
        kernel.meanwhile = lambda: None
        thread.start()
        assert loaded.wait(10)

    kernel.meanwhile = load
    kernel(torch.ones(1))
    assert kernel(torch.ones(1)).item() == -3.0


def test_tensors_that_loading_swaps_are_heard():
    kernel = Slow()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for factor in (3.0, 4.0):
            kernel.load_state_dict({"factor": torch.tensor(factor)})
            assert kernel(torch.ones(1)).item() == factor
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    kernel.factor.fill_(5.0)
    assert kernel(torch.ones(1)).item() == 5.0


def test_a_kernel_that_was_made_in_inference_mode_hears_as_any_other():
    with torch.inference_mode():
        kernel = Slow()
        assert kernel(torch.ones(1)).item() == 2.0
        kernel.factor.fill_(5.0)
        assert kernel(torch.ones(1)).item() == 5.0
    kernel.factor.fill_(7.0)
    assert kernel(torch.ones(1)).item() == 7.0


def test_a_bias_that_was_taken_away_or_given_is_heard(installed_backend):
    model, x = converted(linear, installed_backend, shape=(5, 8)), torch.randn(5, 8)
    kernels = [kernel for kernel in kernels_of(model) if kernel._buffers.get("bias") is not None]
    for kernel in kernels[:1]:
        bias, before = kernel.bias, model(x)
        kernel.bias = None
        assert not torch.equal(model(x), before)
        kernel.bias = bias
        assert torch.equal(model(x), before)
        kernel.bias = nn.Parameter(2 * bias)
        assert "bias" in kernel._buffers and not torch.equal(model(x), before)


def test_a_kernel_is_freed_with_its_last_reference():
    kernel = Slow()
    kernel(torch.ones(1))
    gone = weakref.ref(kernel)
    gc.disable()
    try:
        del kernel
        assert gone() is None
    finally:
        gc.enable()


def test_bounds_are_those_of_the_state_as_it_is():
    class Kernel(KernelModule):
        def __init__(self):
            super().__init__()
            self.add_qparams("output", QParams(0.1, 10, 0, 255, torch.uint8, (0.0, 6.0)))

    kernel = Kernel()
    assert kernel.bounds("output") == (10, 70)
    kernel.output_scale.fill_(0.05)
    kernel.output_zero_point.fill_(3)
    assert kernel.bounds("output") == (3, 123)
    kernel.output_scale.fill_(0.01)
    kernel.output_zero_point.fill_(0)
    assert kernel.bounds("output") is None
