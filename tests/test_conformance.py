"""The conformance suite itself: which faults of a backend it finds, shown by a sound toy backend and planted faults."""

import functools
import os
import random
import threading
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcore.fx import operators as op
from qcore.testing import CASES, EXTREME_CASES, BackendConformance, FakeBackend, plugged_in
from qcore.testing.conformance import _WEIGHT_OBSERVERS
from qcore.testing.fake_backend import Kernel, Quantize, Weight


class Faulty(nn.Module):
    """A sound module of the backend's, and what is done wrong around it."""

    def __init__(self, sound, fault):
        super().__init__()
        self.sound, self.fault = sound, fault

    def forward(self, *inputs):
        return self.fault(self.sound, *inputs)


class Toy(FakeBackend):
    """The fake backend with one fault, or none. A subclass is a fault."""

    name = "toy"

    def wrong(self, kernel, *inputs):
        return kernel(*inputs)

    def wrong_entry(self, quantize, x):
        return quantize(x)

    def wrong_exit(self, dequantize, integers):
        return dequantize(integers)

    def changed(self, kernel, call):
        """The kernel, with other modules in it."""
        return kernel

    def kernel(self, call):
        return Faulty(self.changed(Kernel(call), call), self.wrong)

    def enter(self, qparams):
        return Faulty(super().enter(qparams), self.wrong_entry)

    def leave(self, qparams):
        return Faulty(super().leave(qparams), self.wrong_exit)


class SoundInt8(Toy):
    dtype = torch.int8


def is_convolution(kernel):
    return len(kernel.weights) == 1 and kernel.weights[0].values.dim() > 2


def function_of(kernel):
    """What a kernel of a convolution or a linear layer calls, and the arguments after the bias."""
    ((_, (args, _)),), (operator,) = kernel.steps, kernel.operators
    return op.operator_named(operator).function, args[3:]


# --- faults ---


class OverwritesItsInput(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*inputs)
        inputs[-1].zero_()
        return result


class WritesIntoTheCallersTensor(Toy):
    def wrong_entry(self, quantize, x):
        return quantize(x.clamp_(-1, 1))


def contiguous_strides(x):
    return torch.empty(x.shape, device="meta").stride()


class AssumesContiguousInput(Toy):
    def wrong(self, kernel, *inputs):
        return kernel(*(x.as_strided(x.shape, contiguous_strides(x)) for x in inputs))


class AssumesThatInputBeginsItsMemory(Toy):
    def wrong(self, kernel, *inputs):
        return kernel(*(x.as_strided(x.shape, x.stride(), 0) for x in inputs))


class AssumesContiguousImages(Toy):
    """Of what comes into the model."""

    def wrong_entry(self, quantize, x):
        return quantize(x.as_strided(x.shape, contiguous_strides(x)))


class OffByOne(Toy):
    def wrong(self, kernel, *inputs):
        return (kernel(*inputs).int() + 1).clamp(max=255).to(torch.uint8)


class OffByOneBelowZero(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*inputs).int()
        return torch.where(result < kernel.output.zero_point, result - 1, result).clamp(min=0).to(torch.uint8)


class Truncates(Toy):
    class Truncating(Quantize):
        def forward(self, x):
            steps = torch.floor(x * (1.0 / self.scale)) + self.zero_point
            return torch.clamp(steps, self.low, self.high).to(self.dtype)

    def changed(self, kernel, call):
        if call.weights:
            kernel.output = self.Truncating(call.output)
        return kernel


class IgnoresTheBias(Toy):
    def kernel(self, call):
        return super().kernel(replace(call, biases=(None,) * len(call.biases)))


class SaturatesIn16Bits(Toy):
    """Sums of products in 16 bits, which saturate."""

    def wrong(self, kernel, *inputs):
        if len(kernel.weights) != 1:
            return kernel(*inputs)
        (x,), (given,), (stored,), bias = inputs, kernel.inputs, kernel.weights, kernel.bias_0
        function, geometry = function_of(kernel)
        weight = stored.values.to(torch.float32)
        sums = function(x.to(torch.float32), weight, None, *geometry).clamp(-(2**15), 2**15 - 1)
        sums = sums - function(torch.ones_like(x, dtype=torch.float32) * given.zero_point, weight, None, *geometry)
        shape = [-1, *[1] * (weight.dim() - 2)] if weight.dim() > 2 else [-1]
        real = sums * given.scale * stored.scale.reshape(shape)
        return kernel.output(real if bias is None else real + bias.reshape(shape))


class SaturatesIn16BitsOfInt8(SaturatesIn16Bits):
    dtype = torch.int8


class PadsWithTheWrongZero(Toy):
    def wrong(self, kernel, *inputs):
        if not is_convolution(kernel):
            return kernel(*inputs)
        function, (stride, padding, dilation, groups) = function_of(kernel)
        padded = kernel.inputs[0](F.pad(inputs[0], [size for size in reversed(padding) for _ in range(2)]))
        return kernel.output(function(padded, kernel.weights[0](), kernel.bias_0, stride, 0, dilation, groups))


class IsNotDeterministic(Toy):
    def wrong(self, kernel, *inputs):
        return kernel(*inputs) ^ random.SystemRandom().randrange(2)


class DependsOnTheThread(Toy):
    def wrong(self, kernel, *inputs):
        return kernel(*inputs) ^ int(threading.current_thread() is not threading.main_thread())


class GivesTheLastResult(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*inputs)
        last = vars(kernel).get("last")
        vars(kernel)["last"] = result
        return result if last is None or last.shape != result.shape else last


class GivesTheSameMemory(Toy):
    def wrong_exit(self, dequantize, integers):
        result, memory = dequantize(integers), vars(dequantize).get("memory")
        if memory is None or memory.shape != result.shape:
            memory = vars(dequantize)["memory"] = torch.empty_like(result)
        return memory.copy_(result)


class IgnoresTheClamp(Toy):
    def changed(self, kernel, call):
        kernel.output.low.fill_(0)
        kernel.output.high.fill_(255)
        return kernel


def clamped(low, high, kernel, *inputs):
    return kernel(*inputs).clamp(low, high)


class KeepsBoundsFromConversion(Toy):
    def kernel(self, call):
        return Faulty(Kernel(call), functools.partial(clamped, *(call.output.bounds or (0, 255))))


class KeepsScalesFromConversion(Toy):
    def changed(self, kernel, call):
        for given in kernel.inputs if call.weights else ():
            given.register_buffer("scale", given.scale, persistent=False)
        return kernel


class KeepsItsWeightOutOfItsState(Toy):
    class Packed(Weight):
        def __getstate__(self):
            return {**vars(self), "_buffers": {**self._buffers, "values": self.values * 0}}

    def changed(self, kernel, call):
        kernel.weights = nn.ModuleList(map(self.Packed, call.weights))
        return kernel


class ComputesOneImage(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*(x[:1] for x in inputs))
        return result.expand(inputs[0].shape[0], *result.shape[1:])


class GivesAnotherDtype(Toy):
    def wrong_exit(self, dequantize, integers):
        return dequantize(integers).double()


class LowersNothing(Toy):
    def rules(self):
        return []


class DeclinesSums(Toy):
    def rules(self):
        return [rule for rule in super().rules() if rule.pattern is not op.ADD]


class UsesOneWeightForBoth(Toy):
    """Of the weights of a recurrent cell; the second one's shape is that of the first, but for the columns."""

    def changed(self, kernel, call):
        if len(call.weights) == 2:
            columns = call.weights[1].values.shape[1]
            first = call.weights[0]
            kernel.weights[1] = Weight(replace(first, values=first.values[:, :columns]))
        return kernel


class IgnoresTheSecondBias(Toy):
    def kernel(self, call):
        return super().kernel(replace(call, biases=(*call.biases[:1], *[None] * len(call.biases[1:]))))


class LosesTheBatch(Toy):
    """An empty one."""

    def wrong(self, kernel, *inputs):
        return kernel(*(x if x.numel() else x.new_zeros((1, *x.shape[1:])) for x in inputs))


class ReadsOnBehindItsInput(Toy):
    def wrong(self, kernel, *inputs):
        if is_convolution(kernel):
            inputs = [x[:, : kernel.weights[0].values.shape[1]] for x in inputs]
        return kernel(*inputs)


def sets(name, change):
    """A fault: a kernel that changes a setting of the process."""

    def wrong(self, kernel, *inputs):
        change()
        return kernel(*inputs)

    return type(name, (Toy,), {"wrong": wrong})


class SetsThreadsWhenLowering(Toy):
    def lower(self, model):
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().lower(model)


class DrawsRandomNumbersInAHook(Toy):
    def config(self):
        torch.rand(1)
        return super().config()


SETTINGS = [
    sets("SetsTheDefaultDtype", lambda: torch.set_default_dtype(torch.float64)),
    sets("SetsThreads", lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    sets("TurnsGradientsOn", lambda: torch.set_grad_enabled(True)),
    sets("DrawsRandomNumbers", lambda: torch.rand(1)),
    sets("DrawsPythonsRandomNumbers", random.random),
    sets("WantsDeterministicAlgorithms", lambda: torch.use_deterministic_algorithms(True)),
    sets("FlushesDenormals", lambda: torch.set_flush_denormal(True)),
    sets("LowersThePrecisionOfProducts", lambda: torch.set_float32_matmul_precision("medium")),
    sets("SilencesWarnings", lambda: warnings.simplefilter("ignore")),
    sets("SetsTheEnvironment", lambda: os.environ.update(TOY_THREADS="1")),
]

COMPUTES = "test_a_kernel_computes_what_the_reference_does"
LEAVES = "test_integers_that_are_read_again_are_left_as_they_are"
SAME = "test_the_same_call_gives_the_same_bits"
SAVED = "test_copies_and_saved_models_compute_the_same_bits"
LOADED = "test_a_state_dict_makes_a_twin_the_same_model"
CLAIMS = "test_what_the_backend_claims_ends_in_a_kernel"
SATURATES = "test_nothing_saturates_at_the_ends_of_the_ranges"
DEFAULT = "test_the_default_mapping_gives_kernels_at_the_ends_of_the_ranges"
REPEATED = "test_calls_of_one_kind_compute_the_same_bits"
EMPTY = "test_an_empty_batch_gives_an_empty_result"
REFUSED = "test_a_shape_that_the_float_model_refuses_is_refused"
HOOKS = "test_the_hooks_leave_the_process_as_it_is"

#: Each fault with the checks that must find it: method, case, and further arguments.
FOUND = [
    (OverwritesItsInput, [(LEAVES, "conv2d 3x3", False), (LEAVES, "add", False), (LEAVES, "linear", True)]),
    (WritesIntoTheCallersTensor, [(COMPUTES, "conv2d 3x3"), (SAME, "linear")]),
    (AssumesContiguousInput, [(COMPUTES, "conv2d 3x3"), (LEAVES, "conv2d 3x3", True), (LEAVES, "linear", True),
                              (LEAVES, "add", True), (LEAVES, "avg_pool2d", True)]),
    (AssumesThatInputBeginsItsMemory, [(LEAVES, "conv2d 3x3", True), (LEAVES, "linear", True), (LEAVES, "add", True)]),
    (AssumesContiguousImages, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "add"), (COMPUTES, "linear")]),
    (OffByOne, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "linear"), (COMPUTES, "add"), (COMPUTES, "mean"),
                (LEAVES, "conv2d 3x3", False)]),
    (OffByOneBelowZero, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "linear"), (COMPUTES, "add")]),
    (Truncates, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "linear")]),
    (IgnoresTheBias, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "linear")]),
    (SaturatesIn16Bits, [(SATURATES, "conv2d 3x3", "per channel"), (SATURATES, "linear", "unknown"),
                         (DEFAULT, "conv2d 3x3")]),
    (SaturatesIn16BitsOfInt8, [(SATURATES, "conv2d 3x3", "per channel"), (SATURATES, "linear", "per channel"),
                               (DEFAULT, "linear")]),
    (PadsWithTheWrongZero, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "conv3d")]),
    (IsNotDeterministic, [(SAME, "conv2d 3x3"), (SAME, "add")]),
    (DependsOnTheThread, [(SAME, "conv2d 3x3"), (SAME, "add")]),
    (GivesTheLastResult, [(SAME, "conv2d 3x3"), (SAME, "mean"), (REPEATED, "conv2d 3x3"), (REPEATED, "add")]),
    (GivesTheSameMemory, [(SAME, "conv2d 3x3"), (SAME, "linear")]),
    (IgnoresTheClamp, [(COMPUTES, "conv2d + clamp above zero"), (COMPUTES, "add + clamp above zero"),
                       (COMPUTES, "linear + clamp below zero"), (COMPUTES, "cat with a clamped convolution")]),
    (KeepsBoundsFromConversion, [(LOADED, "cat with a clamped convolution")]),
    (KeepsScalesFromConversion, [(LOADED, "conv2d 3x3"), (LOADED, "linear")]),
    (KeepsItsWeightOutOfItsState, [(SAVED, "conv2d 3x3"), (SAVED, "linear")]),
    (ComputesOneImage, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "linear")]),
    (GivesAnotherDtype, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "add")]),
    (LowersNothing, [(CLAIMS, "conv2d 3x3"), (CLAIMS, "linear"), (CLAIMS, "add"), (CLAIMS, "avg_pool2d"),
                     (DEFAULT, "conv2d 3x3")]),
    (DeclinesSums, [(CLAIMS, "add"), (CLAIMS, "add + ReLU")]),
    (UsesOneWeightForBoth, [(COMPUTES, "gru_cell"), (COMPUTES, "rnn_tanh_cell")]),
    (IgnoresTheSecondBias, [(COMPUTES, "gru_cell"), (COMPUTES, "rnn_relu_cell")]),
    (LosesTheBatch, [(EMPTY, "conv2d 3x3"), (EMPTY, "linear")]),
    (ReadsOnBehindItsInput, [(REFUSED, "conv2d 3x3")]),
    (SetsThreadsWhenLowering, [(COMPUTES, "conv2d 3x3"), (SAME, "conv2d 3x3")]),
    (DrawsRandomNumbersInAHook, [(HOOKS,)]),
    *((fault, [(COMPUTES, "conv2d 3x3")]) for fault in SETTINGS),
]  # fmt: skip


@pytest.fixture
def suite():
    """Makes a conformance suite of a toy backend, of which single checks are called."""

    def check(toy, method, *arguments):
        class Suite(BackendConformance):
            backend = "toy"

        cases = EXTREME_CASES if method in (SATURATES, DEFAULT) else CASES
        given = [next(case for case in cases if case.name == name) for name in arguments[:1]]
        torch.manual_seed(0)
        with plugged_in("toy", toy.plugin()):
            getattr(Suite(), method)(*given, *arguments[1:])

    return check


CHECKS = list(dict.fromkeys(check for _, checks in FOUND for check in checks))


@pytest.mark.parametrize(("method", "arguments"), [(method, rest) for method, *rest in CHECKS])
def test_a_sound_backend_passes(suite, method, arguments):
    suite(Toy(), method, *arguments)


@pytest.mark.parametrize("case", [case.name for case in EXTREME_CASES if "140,000" not in case.name])
def test_a_sound_backend_on_int8_passes_where_sums_could_saturate(suite, case):
    suite(SoundInt8(), DEFAULT, case)
    suite(SoundInt8(), SATURATES, case, "per channel")


@pytest.mark.parametrize(
    ("fault", "method", "arguments"),
    [
        pytest.param(fault, method, rest, id=f"{fault.__name__}-{'-'.join(map(str, rest)) or method}")
        for fault, checks in FOUND
        for method, *rest in checks
    ],
)
def test_a_fault_is_found(suite, fault, method, arguments):
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        suite(fault(), method, *arguments)


def test_a_fault_of_a_setting_is_put_back(suite):
    before = torch.get_num_threads(), torch.get_default_dtype(), list(warnings.filters), dict(os.environ)
    for fault in SETTINGS:
        with pytest.raises(AssertionError, match="the backend changes .* for the whole process"):
            suite(fault(), COMPUTES, "conv2d 3x3")
    assert before == (torch.get_num_threads(), torch.get_default_dtype(), list(warnings.filters), dict(os.environ))


def test_weights_that_a_backend_does_not_claim_are_skipped_and_not_passed(suite):
    with pytest.raises(pytest.skip.Exception, match="takes no per_tensor_symmetric weights"):
        suite(Toy(), SATURATES, "conv2d 3x3", "per tensor")
    assert set(_WEIGHT_OBSERVERS) == {"per channel", "per tensor", "unknown"}


def test_a_backend_that_claims_weights_and_quantizes_none_fails(suite):
    class TakesOtherBiases(Toy):
        def config(self):
            config = super().config()
            for pattern in config.configs:
                pattern.dtype_configs = [replace(dtypes, bias_dtype=torch.float16) for dtypes in pattern.dtype_configs]
            return config

    for method, rest in ((SATURATES, ["per channel"]), (DEFAULT, [])):
        with pytest.raises(AssertionError, match="quantize"):
            suite(TakesOtherBiases(), method, "conv2d 3x3", *rest)
