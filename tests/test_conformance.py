"""The conformance suite itself: which faults of a backend it finds, shown by a sound toy backend and planted faults."""

import functools
import os
import random
import threading
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from qcore_torch_kernels.float_kernel import FloatKernel
from qcore_torch_kernels.graph import lower
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.testing import TorchKernelsConformance
from torch import nn

from qcore.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig, DTypeWithConstraints
from qcore.dtypes import QScheme
from qcore.fx import operators as op
from qcore.fx.fuse import BATCH_NORM_FUSIONS
from qcore.fx.sharing import sharing_patterns
from qcore.lowering import LoweringRule
from qcore.observer import HistogramObserver, PerChannelMinMaxObserver
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import QConfigMapping
from qcore.testing import CASES, EXTREME_CASES, plugged_in
from qcore.testing.conformance import _WEIGHT_OBSERVERS

WEIGHTED = (*op.CONV, op.LINEAR)
UNWEIGHTED = (op.ADD, op.MUL, op.MEAN, *op.AVG_POOL)


def bounds(qparams):
    info = torch.iinfo(qparams.dtype)
    return qparams.bounds or (info.min, info.max)


class State(KernelModule):
    """A kernel that packs nothing: all that it computes with are its buffers."""

    def pack(self):
        return self.compute

    def add(self, name, qparams):
        low, high = bounds(qparams)
        for part, value in (
            ("scale", qparams.scale), ("zero_point", qparams.zero_point), ("low", low), ("high", high)
        ):  # fmt: skip
            self.register_buffer(f"{name}_{part}", torch.tensor(float(value)))
        self.dtype = qparams.dtype

    def to_real(self, x, name="input"):
        return (x.to(torch.float32) - getattr(self, f"{name}_zero_point")) * getattr(self, f"{name}_scale")

    def to_integers(self, x):
        steps = torch.round(x * (1.0 / self.output_scale)) + self.output_zero_point
        return torch.minimum(torch.maximum(steps, self.output_low), self.output_high).to(self.dtype)


class Enter(State):
    def __init__(self, qparams):
        super().__init__()
        self.add("output", qparams)

    def compute(self, x):
        return self.to_integers(x)


class Leave(State):
    def __init__(self, qparams):
        super().__init__()
        self.add("input", qparams)

    def compute(self, x):
        return self.to_real(x)


class Weighted(State):
    """A convolution or a linear layer."""

    def __init__(self, call):
        super().__init__()
        self.add("input", call.inputs[0])
        self.add("output", call.output)
        self.register_buffer("weight", call.weight.values)
        self.register_buffer("weight_scale", call.weight.scale_per_channel)
        self.register_buffer("bias", call.bias)
        self.operator, self.geometry = op.operator_of(call.nodes[0]).name, call.args[3:]

    def real_weight(self):
        return self.weight * self.weight_scale.reshape(-1, *[1] * (self.weight.dim() - 1))

    def apply(self, x, weight, bias):
        return op.operator_named(self.operator).function(x, weight, bias, *self.geometry)

    def compute(self, x):
        return self.to_integers(self.apply(self.to_real(x), self.real_weight(), self.bias))


class Faulty(nn.Module):
    """A sound kernel, and what is done wrong around it."""

    def __init__(self, kernel, fault):
        super().__init__()
        self.kernel, self.fault = kernel, fault

    @property
    def replayable(self):
        return True

    def forward(self, *inputs):
        return self.fault(self.kernel, *inputs)


class Toy:
    """A backend on plain integers, with one fault or none. A subclass is a fault.

    Attributes:
        dtype: of activations.
    """

    dtype = torch.uint8

    def wrong(self, kernel, *inputs):
        return kernel(*inputs)

    def kernel(self, call):
        kernel = Weighted(call) if call.weights else FloatKernel(call, self.enter, self.leave)
        return Faulty(kernel, self.wrong)

    def enter(self, qparams):
        return Enter(qparams)

    def leave(self, qparams):
        return Leave(qparams)

    def rules(self):
        return [LoweringRule(operator, self.kernel) for operator in (*WEIGHTED, *UNWEIGHTED, op.CLAMP, *op.MAX_POOL)]

    def lower(self, model):
        return lower(model, self.rules(), enter=self.enter, leave=self.leave)

    def mapping(self, version):
        weight = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
        return QConfigMapping().set_global(QConfig(HistogramObserver.with_args(dtype=self.dtype), weight))

    def config(self):
        activation = DTypeWithConstraints(self.dtype)
        weight = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_channel_symmetric,), ch_axis=0)
        config = BackendConfig("toy")
        for operator in WEIGHTED:
            dtypes = DTypeConfig(activation, activation, weight, torch.float32)
            config.set_backend_pattern_config(BackendPatternConfig(operator).add_dtype_config(dtypes))
        for operator in UNWEIGHTED:
            dtypes = DTypeConfig(activation, activation)
            config.set_backend_pattern_config(BackendPatternConfig(operator).add_dtype_config(dtypes))
        return config.set_backend_pattern_configs(sharing_patterns(DTypeConfig(activation, activation)))

    def plugin(self):
        hooks = {
            "qcore_backend_info": lambda: BackendInfo("toy", PLUGIN_API),
            "qcore_probe": lambda: Availability(True),
            "qcore_backend_config": lambda: self.config(),
            "qcore_fusion_patterns": lambda: BATCH_NORM_FUSIONS,
            "qcore_default_qconfig_mapping": lambda version: self.mapping(version),
            "qcore_lower": lambda model: self.lower(model),
        }
        return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


class SoundInt8(Toy):
    dtype = torch.int8


# --- faults ---


class OverwritesItsInput(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*inputs)
        inputs[-1].zero_()
        return result


class WritesIntoTheCallersTensor(Toy):
    class Entering(Enter):
        def compute(self, x):
            return self.to_integers(x.clamp_(-1, 1))

    def enter(self, qparams):
        return self.Entering(qparams)


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

    class Entering(Enter):
        def compute(self, x):
            return self.to_integers(x.as_strided(x.shape, contiguous_strides(x)))

    def enter(self, qparams):
        return self.Entering(qparams)


class OffByOne(Toy):
    def wrong(self, kernel, *inputs):
        return (kernel(*inputs).int() + 1).clamp(max=255).to(torch.uint8)


class OffByOneBelowZero(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*inputs).int()
        inner = kernel if isinstance(kernel, Weighted) else kernel.enter
        return torch.where(result < inner.output_zero_point, result - 1, result).clamp(min=0).to(torch.uint8)


class Truncates(Toy):
    class Truncating(Weighted):
        def to_integers(self, x):
            steps = torch.floor(x * (1.0 / self.output_scale)) + self.output_zero_point
            return torch.minimum(torch.maximum(steps, self.output_low), self.output_high).to(self.dtype)

    def kernel(self, call):
        return self.Truncating(call) if call.weights else super().kernel(call)


class IgnoresTheBias(Toy):
    def kernel(self, call):
        return super().kernel(replace(call, biases=(None,)))


class Narrow(Weighted):
    """Sums of products in 16 bits, which saturate."""

    def compute(self, x):
        weight = self.weight.to(torch.float32)
        sums = self.apply(x.to(torch.float32), weight, None).clamp(-(2**15), 2**15 - 1)
        sums = sums - self.apply(torch.ones_like(x, dtype=torch.float32) * self.input_zero_point, weight, None)
        shape = [-1, *[1] * (weight.dim() - 2)] if weight.dim() > 2 else [-1]
        real = sums * self.input_scale * self.weight_scale.reshape(shape)
        return self.to_integers(real if self.bias is None else real + self.bias.reshape(shape))


class SaturatesIn16Bits(Toy):
    def kernel(self, call):
        return Narrow(call) if call.weights else super().kernel(call)


class SaturatesIn16BitsOfInt8(SaturatesIn16Bits):
    dtype = torch.int8


class PadsWithTheWrongZero(Toy):
    class Padding(Weighted):
        def compute(self, x):
            stride, padding, dilation, groups = self.geometry
            padded = F.pad(x, [size for size in reversed(padding) for _ in range(2)])
            arguments = (self.real_weight(), self.bias, stride, 0, dilation, groups)
            return self.to_integers(op.operator_named(self.operator).function(self.to_real(padded), *arguments))

    def kernel(self, call):
        return self.Padding(call) if len(call.args) > 3 and call.weight is not None else super().kernel(call)


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
    class Leaving(Leave):
        def compute(self, x):
            result = self.to_real(x)
            if vars(self).get("memory") is None or self.memory.shape != result.shape:
                vars(self)["memory"] = torch.empty_like(result)
            return self.memory.copy_(result)

    def leave(self, qparams):
        return self.Leaving(qparams)


class IgnoresTheClamp(Toy):
    def kernel(self, call):
        made = super().kernel(call)
        state = made.kernel if call.weights else made.kernel.enter
        state.output_low.fill_(0)
        state.output_high.fill_(255)
        return made


def clamped(low, high, kernel, *inputs):
    return kernel(*inputs).clamp(low, high)


class KeepsBoundsFromConversion(Toy):
    def kernel(self, call):
        kernel = super().kernel(call)
        kernel.fault = functools.partial(clamped, *bounds(call.output))
        return kernel


class KeepsScalesFromConversion(Toy):
    def kernel(self, call):
        kernel = super().kernel(call)
        if call.weight is not None:
            kernel.kernel.register_buffer("input_scale", kernel.kernel.input_scale, persistent=False)
        return kernel


class KeepsItsWeightOutOfItsState(Toy):
    class Packed(Weighted):
        def __getstate__(self):
            return {**super().__getstate__(), "_buffers": {**self._buffers, "weight": self.weight * 0}}

    def kernel(self, call):
        return self.Packed(call) if call.weights else super().kernel(call)


class ComputesOneImage(Toy):
    def wrong(self, kernel, *inputs):
        result = kernel(*(x[:1] for x in inputs))
        return result.expand(inputs[0].shape[0], *result.shape[1:])


class GivesAnotherDtype(Toy):
    class Leaving(Leave):
        def compute(self, x):
            return self.to_real(x).double()

    def leave(self, qparams):
        return self.Leaving(qparams)


class ReadsData(Toy):
    def wrong(self, kernel, *inputs):
        return kernel(*inputs) if int(inputs[0].flatten()[0]) >= 0 else inputs[0]


class LowersNothing(Toy):
    def rules(self):
        return []


class DeclinesSums(Toy):
    def rules(self):
        return [rule for rule in super().rules() if rule.pattern is not op.ADD]


class LosesTheBatch(Toy):
    """An empty one."""

    def wrong(self, kernel, *inputs):
        return kernel(*(x if x.numel() else x.new_zeros((1, *x.shape[1:])) for x in inputs))


class ReadsOnBehindItsInput(Toy):
    def wrong(self, kernel, *inputs):
        if isinstance(kernel, Weighted) and kernel.weight.dim() > 2:
            inputs = [x[:, : kernel.weight.shape[1]] for x in inputs]
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
REPLAYED = "test_calls_of_one_kind_compute_the_same_bits"
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
    (GivesTheLastResult, [(SAME, "conv2d 3x3"), (SAME, "mean")]),
    (GivesTheSameMemory, [(SAME, "conv2d 3x3"), (SAME, "linear")]),
    (IgnoresTheClamp, [(COMPUTES, "conv2d + clamp above zero"), (COMPUTES, "add + clamp above zero"),
                       (COMPUTES, "linear + clamp below zero"), (COMPUTES, "cat with a clamped convolution")]),
    (KeepsBoundsFromConversion, [(LOADED, "cat with a clamped convolution")]),
    (KeepsScalesFromConversion, [(LOADED, "conv2d 3x3"), (LOADED, "linear")]),
    (KeepsItsWeightOutOfItsState, [(SAVED, "conv2d 3x3"), (SAVED, "linear")]),
    (ComputesOneImage, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "linear")]),
    (GivesAnotherDtype, [(COMPUTES, "conv2d 3x3"), (COMPUTES, "add")]),
    (ReadsData, [(REPLAYED, "conv2d 3x3"), (REPLAYED, "add")]),
    (LowersNothing, [(CLAIMS, "conv2d 3x3"), (CLAIMS, "linear"), (CLAIMS, "add"), (CLAIMS, "avg_pool2d"),
                     (DEFAULT, "conv2d 3x3")]),
    (DeclinesSums, [(CLAIMS, "add"), (CLAIMS, "add + ReLU")]),
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
        class Suite(TorchKernelsConformance):
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
