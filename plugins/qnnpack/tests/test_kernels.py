"""What this backend promises beyond the conformance suite: engines, names, warnings, awkward calls, exact sums."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import qcore_qnnpack.kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcore
from qcore.fx.graph_module import QGraphModule
from qcore.lowering import QParams
from qcore.testing import CASES, Case, ask_by_name, steps_apart

BACKEND = "qnnpack"
ENGINES = kernels.supported_engines()
#: Computed in float on purpose; the plan says why.
LEFT_FLOAT = {"conv2d padding same, even kernel"}

pytestmark = pytest.mark.skipif(kernels.ENGINE not in ENGINES, reason="this torch has no such engine here")


@pytest.fixture(autouse=True)
def _put_back_the_engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.manual_seed(0)
    yield
    torch.backends.quantized.engine = before


def make(
    model: nn.Module, *inputs: Tensor, mapping: qcore.QConfigMapping | None = None
) -> tuple[QGraphModule, nn.Module]:
    """The reference model and the converted one."""
    mapping = ask_by_name(qcore.get_default_qconfig_mapping(BACKEND)) if mapping is None else mapping
    prepared = qcore.prepare_fx(model.eval(), mapping, inputs, backend=BACKEND, on_unsupported="ignore")
    with torch.no_grad():
        prepared(*inputs)
    return qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)


def steps(models: tuple[QGraphModule, nn.Module], *inputs: Tensor) -> float:
    """How far the converted model is from the reference, in steps of the output."""
    reference, converted = models
    with torch.no_grad():
        return steps_apart(reference, reference(*inputs), converted(*inputs))[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_engine_gives_the_same_bits(case: Case):
    _, converted = make(case.build(), *case.inputs(2))
    results = []
    inputs = case.inputs(3)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = [x.contiguous(memory_format=layout if x.dim() == 4 else torch.contiguous_format) for x in inputs]
        for engine in ENGINES:
            torch.backends.quantized.engine = engine
            # The copy packs its weights anew, while another engine is set.
            results += [model(*given) for model in (converted, copy.deepcopy(converted))]
            assert torch.backends.quantized.engine == engine
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_quantized_has_a_kernel(case: Case):
    _, converted = make(case.build(), *case.inputs(2))
    for decision in qcore.explain(converted).quantized:
        if case.name not in LEFT_FLOAT:
            assert decision.kernel and not decision.reason


@pytest.mark.parametrize("activation", ["SiLU", "GELU"])
def test_what_has_no_kernel_stays_float_and_the_plan_says_so(activation: str):
    _, converted = make(nn.Sequential(nn.Linear(8, 8), getattr(nn, activation)()), torch.randn(2, 8))
    (decision,) = [d for d in qcore.explain(converted).decisions if not d.quantized]
    assert decision.reason == f"{BACKEND} has no pattern for it"


def test_names_of_kernels_say_what_they_compute():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    _, converted = make(model, torch.randn(2, 4, 6, 6))
    names = {decision.operators[0]: decision.kernel for decision in qcore.explain(converted).quantized}
    title = BACKEND.upper()
    # The ReLU is the lower end of the convolution's range.
    assert names == {"conv2d": f"{title} conv2d", "flatten": "integers as they are", "linear": f"{title} linear"}


def test_a_relu_in_the_middle_of_a_range_is_the_kernels():
    weight = qcore.PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
    activation = qcore.MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric)
    mapping = qcore.QConfigMapping().set_global(qcore.QConfig(activation, weight))
    for layer, shape in (
        (nn.Conv1d(4, 4, 1), (2, 4, 9)),
        (nn.Conv3d(4, 4, 1), (2, 4, 3, 3, 3)),
        (nn.Linear(4, 4), (9, 4)),
    ):
        x = torch.randn(shape)
        models = make(nn.Sequential(layer, nn.ReLU()), x, mapping=mapping)
        assert steps(models, x) <= 1.01
        (decision,) = qcore.explain(models[1]).quantized
        assert decision.kernel.endswith("_relu")


def test_no_warning_about_quantized_dtypes_reaches_the_user():
    # torch warns once in a process, so it takes a fresh one.
    script = """
import torch, qcore
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
x = torch.randn(1, 3, 6, 6)
prepared = qcore.prepare_fx(model.eval(), qcore.get_default_qconfig_mapping("qnnpack"), (x,))
prepared(x)
qcore.convert_fx(prepared)(x)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_models_are_packed_and_run_side_by_side_whatever_the_engine_is():
    made = [make(case.build(), *case.inputs(2))[1] for case in CASES[:8]]
    inputs = [case.inputs(2) for case in CASES[:8]]
    expected = [model(*given) for model, given in zip(made, inputs, strict=True)]

    for engine in ENGINES:
        torch.backends.quantized.engine = engine
        fresh = copy.deepcopy(made)

        def call(number: int, fresh: list[nn.Module] = fresh) -> bool:
            place = number // 4
            return torch.equal(fresh[place](*inputs[place]), expected[place])

        with ThreadPoolExecutor(4) as pool:  # All four meet the same unpacked model.
            assert all(pool.map(call, range(32)))
        assert torch.backends.quantized.engine == engine


def test_models_run_side_by_side_while_the_engine_changes():
    made = [make(case.build(), *case.inputs(2))[1] for case in CASES[:8]]
    inputs = [case.inputs(2) for case in CASES[:8]]
    expected = [model(*given) for model, given in zip(made, inputs, strict=True)]

    def call(number: int) -> bool:
        torch.backends.quantized.engine = ENGINES[number % len(ENGINES)]
        place = number % len(made)
        return torch.equal(made[place](*inputs[place]), expected[place])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(64)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv1d(4, 4, 3), (4, 6)),
        (nn.Conv2d(4, 5, 3, padding=1), (4, 6, 7)),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 6, 7)),
        (nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
        (nn.Linear(8, 3), (8,)),
        (nn.ConvTranspose2d(4, 3, 2, stride=2), (4, 5, 3)),
    ],
    ids=str,
)
def test_inputs_without_a_batch(model: nn.Module, shape: tuple[int, ...]):
    x = torch.randn(shape)
    models = make(nn.Sequential(model, nn.ReLU6()), x)
    assert steps(models, x) <= 1.01


class _Two(nn.Module):
    """Two convolutions of one input, and a function of what they give."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a.transpose(2, 3) + b,
        lambda a, b: a.transpose(2, 3) * b,
        lambda a, b: a[:, 1:3] + b[:, :2],
        lambda a, b: a[:, 1:3, ::2] * b[:, :2, 1::2],
        lambda a, b: a + b[0],
        lambda a, b: torch.sigmoid(F.adaptive_avg_pool2d(b, 1)) * a,
        lambda a, b: torch.cat([a, b, a.transpose(2, 3)], 1),
        lambda a, b: F.pad(a[:, 1:3, ::2], (1, -1), mode="constant"),
        lambda a, b: F.max_pool2d(a[:, 1:3], 2, padding=1),
    ],
)
def test_views_and_mixed_layouts(function: Callable[[Tensor, Tensor], Tensor]):
    x = torch.randn(2, 4, 6, 6)
    models = make(_Two(function), x)
    # The convolutions before may each be one step off.
    assert steps(models, x) <= 4


TRANSPOSED = [
    (nn.ConvTranspose1d, (2, 8, 7)),
    (nn.ConvTranspose2d, (2, 8, 5, 6)),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("kind", "shape"), TRANSPOSED, ids=lambda value: getattr(value, "__name__", ""))
def test_transposed_convolutions(kind: type[nn.Module], shape: tuple[int, ...], groups: int, batch: int):
    model = nn.Sequential(kind(8, 16, 3, stride=2, padding=1, output_padding=1, groups=groups), nn.ReLU())
    models = make(model, torch.randn(shape))
    assert steps(models, torch.randn(batch, *shape[1:])) <= 1.01
    (decision,) = qcore.explain(models[1]).quantized
    assert decision.kernel.startswith(f"{BACKEND.upper()} conv_transpose")


@pytest.mark.parametrize(("kind", "shape"), TRANSPOSED, ids=lambda value: getattr(value, "__name__", ""))
def test_transposed_convolutions_at_the_ends_of_the_ranges(kind: type[nn.Module], shape: tuple[int, ...]):
    model = kind(8, 4, 3)
    nn.init.constant_(model.weight, 0.5)
    models = make(nn.Sequential(model), torch.ones(shape))
    assert steps(models, torch.ones(shape)) <= 1.01


def test_a_batch_norm_after_a_transposed_convolution_is_folded():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU6())
    x = torch.randn(2, 4, 5, 5)
    models = make(model, x)
    assert steps(models, x) <= 1.01
    assert all(decision.quantized for decision in qcore.explain(models[1]).decisions)


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 1), nn.Linear(4, 6)], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-36, 1e-20, 1e-6, 1e10])
def test_values_of_any_size(module: nn.Module, size: float):
    x = size * (torch.randn(2, 4, 5, 5) if isinstance(module, nn.Conv2d) else torch.randn(3, 4))
    model = copy.deepcopy(module)
    with torch.no_grad():
        model.bias.mul_(size)
    assert steps(make(nn.Sequential(model), x), x) <= 1.01


def test_two_models_of_other_scales_may_share_weights():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Hardtanh(-1, 1), layer)
    x = 3 * torch.randn(5, 8)
    assert steps(make(model, x), x) <= 3


def test_the_process_keeps_its_warning_filters():
    before = list(warnings.filters)
    make(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))[1](torch.randn(2, 4))
    assert warnings.filters == before


def test_scales_below_normal_numbers_are_left_to_float():
    x = 1e-37 * torch.randn(3, 4)
    _, converted = make(nn.Sequential(nn.Linear(4, 4, bias=False)), x)
    (decision,) = qcore.explain(converted).quantized
    assert "at an end of float32's range" in decision.reason


def test_a_transposed_convolution_of_3_dimensions_stays_float():
    _, converted = make(nn.Sequential(nn.ConvTranspose3d(2, 2, 2)), torch.randn(1, 2, 3, 3, 3))
    (decision,) = qcore.explain(converted).decisions
    assert not decision.quantized and decision.reason == "qnnpack has no pattern for it"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted as Linux lists them")
def test_between_convolutions_no_thread_is_started():
    # torch's threads would spin on after their work, beside those of QNNPACK's own pool. In a fresh process there are
    # none until something starts them.
    script = """
import os, torch
from qcore.lowering import QParams
from qcore_qnnpack import kernels
torch.set_num_threads(1)
output = QParams(0.1, 128, 0, 255, torch.uint8)
quantize, add, pool, dequantize = (
    kernels.Quantize(output), kernels.QAdd(output), kernels.QGlobalAvgPool(output), kernels.Dequantize(output)
)
image = torch.randn(2, 256, 16, 16)

def run():
    x = kernels._channels_last(quantize(image))
    return dequantize(pool(add(x, x)))

first = run()
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
assert torch.equal(run(), first)
assert len(os.listdir("/proc/self/task")) == before
image + 1
assert len(os.listdir("/proc/self/task")) > before, "this torch starts no threads; the test shows nothing"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_images_are_rearranged_for_convolutions_as_they_are():
    output = QParams(0.1, 7, 0, 255, torch.uint8)
    quantize = kernels.Quantize(output)
    for shape in ((1, 3, 224, 224), (2, 3, 5, 7), (3, 1, 4, 4), (1, 40000, 2, 2), (0, 3, 4, 4)):
        x = torch.randn(shape)
        expected = quantize(x)
        moved = kernels._channels_last(expected)
        assert moved.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(moved.int_repr(), expected.int_repr())
        plain = torch.quantize_per_tensor(x, *quantize.qparams("output"), torch.quint8)
        assert torch.equal(expected.int_repr(), plain.int_repr())


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (3, 1000, 7, 7), (1, 4, 200, 200), (6, 4, 4)], ids=str)
def test_averages_over_whole_images(shape: tuple[int, ...]):
    x = kernels.Quantize(QParams(0.02, 131, 0, 255, torch.uint8))(torch.randn(shape))
    output = QParams(0.005, 90, 0, 255, torch.uint8)
    expected = kernels.Quantize(output)(F.adaptive_avg_pool2d(x.dequantize(), 1))
    found = kernels.QGlobalAvgPool(output)(x)
    assert found.shape == expected.shape
    assert (found.int_repr().int() - expected.int_repr().int()).abs().max() <= 1


@pytest.mark.parametrize(("size", "kernel"), [(1, "mean of integers"), (2, "float within the kernel")])
def test_only_averages_over_whole_images_are_taken_on_integers(size: int, kernel: str):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(size), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 6, 6)
    models = make(model, x)
    assert steps(models, x) <= 2.01
    assert qcore.explain(models[1]).quantized[1].kernel == kernel
