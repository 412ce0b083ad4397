"""What this backend promises beyond the conformance suite: engines, names, residuals, awkward calls, tables."""

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from qcore_torch_kernels import shells
from qcore_torch_kernels.lookup import LookupKernel
from qcore_torch_kernels.testing import KernelSuite, One, Two, kernel_names, make, steps
from qcore_x86_onednn import kernels
from qcore_x86_onednn.by_shape import MAX_SHAPES, by_shape
from qcore_x86_onednn.plugin import qcore_backend_info, qcore_probe
from torch import Tensor, nn

import qcore
from qcore.lowering import QParams
from qcore.testing import CASES

BACKEND = "x86_onednn"
pytestmark = pytest.mark.skipif(bool(kernels.missing_kernels()), reason="no oneDNN here")


class TestKernels(KernelSuite):
    backend = BACKEND
    left_float = KernelSuite.left_float | {case.name for case in CASES if case.name.startswith("conv_transpose")}


@pytest.mark.parametrize(
    ("model", "shape", "kernel"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.Hardswish()), (2, 4, 6, 6), "onednn::qconv2d_pointwise + hardswish"),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.SiLU()), (2, 4, 6, 6), "onednn::qconv2d_pointwise + swish"),
        (nn.Sequential(nn.Linear(9, 6), nn.Hardswish()), (2, 9), "onednn::qlinear_pointwise + hardswish"),
        (nn.Sequential(nn.Linear(9, 6), nn.SiLU()), (2, 9), "onednn::qlinear_pointwise + swish"),
        (nn.Sequential(nn.Linear(9, 6), nn.GELU()), (2, 9), "onednn::qlinear_pointwise + gelu"),
        (nn.Sequential(nn.Linear(9, 6), nn.LeakyReLU(0.2)), (2, 9), "onednn::qlinear_pointwise + leaky_relu"),
        (nn.Sequential(nn.Linear(9, 6), nn.Tanh()), (2, 9), "onednn::qlinear_pointwise + tanh"),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU6()), (2, 4, 6, 6), "quantized::conv2d"),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.Hardsigmoid()), (2, 4, 6, 6), "quantized::conv2d"),
        (nn.Sequential(nn.Linear(9, 6), nn.Hardsigmoid()), (2, 9), "onednn::qlinear_pointwise"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_last", [True, False])
def test_activations_are_computed_in_the_kernel(model: nn.Module, shape: tuple[int, ...], kernel: str, is_last: bool):
    x = torch.randn(shape)
    models = make(BACKEND, model if is_last else nn.Sequential(*model, nn.Flatten(0)), x)
    assert kernel_names(models[1])[0].removeprefix("quantized::linear, for many rows ") == kernel
    assert steps(models, x) <= 1.01 and steps(models, torch.randn(3, *shape[1:])) <= 1.01


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.2)], ids=str)
@pytest.mark.parametrize("gives_float", [True, False])
def test_few_and_many_rows_are_the_same_layer(activation: nn.Module, gives_float: bool):
    layers = [nn.Linear(24, 10), activation, *([] if gives_float else [nn.Flatten(0, 1)])]
    models = make(BACKEND, nn.Sequential(*layers), torch.randn(2, 70, 24))
    for rows in (1, 8, 9, 64, 65, 200):
        assert steps(models, torch.randn(2, rows, 24)) <= 1.01


def _depthwise(channels: int, weight: float) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    nn.init.constant_(conv.weight, weight)
    with torch.no_grad():
        conv.weight[:, :, 1, 1] = 1.0
    return nn.Sequential(conv, nn.ReLU())


@pytest.mark.parametrize(
    ("channels", "neighbour", "engine"), [(192, 0.2, "fbgemm"), (192, 0.9, "onednn"), (96, 0.2, "onednn")]
)
def test_depthwise_convolutions_go_where_they_are_fast_if_that_costs_little(
    channels: int, neighbour: float, engine: str
):
    x = torch.rand(1, channels, 6, 6)
    models = make(BACKEND, nn.Sequential(*_depthwise(channels, neighbour), nn.Flatten(0)), x)
    (conv,) = (module for module in models[1].modules() if isinstance(module, kernels.QConv))
    assert conv.engine(x.shape) == ("onednn" if kernels.has_vnni() else engine)
    for given in (x, torch.ones_like(x), torch.rand(3, channels, 9, 4)):
        assert steps(models, given) <= 1.01


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardswish()], ids=str)
def test_any_number_of_input_shapes(activation: nn.Module):
    models = make(
        BACKEND, nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), activation, nn.Conv2d(6, 4, 1)), torch.randn(2, 4, 6, 6)
    )
    for turn in range(2):
        for size in range(1, MAX_SHAPES + 4):
            assert steps(models, torch.randn(1 + turn, 4, size, 5)) <= 2.01


@pytest.mark.parametrize("unit", [0.1, 30.0])
def test_a_hard_sigmoid_in_its_convolution_ends_where_it_ends(unit: float):
    x = torch.randn(2, 8, 5, 5) * unit
    models = make(BACKEND, nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardsigmoid(), nn.Flatten(0)), x)
    assert steps(models, x) <= 1.01
    result = models[1](x)
    assert result.min() >= 0 and result.max() <= 255 / 256
    assert (unit == 30.0) == (result.min() == 0 and result.max() == 255 / 256)


@pytest.mark.parametrize(
    ("dims", "keepdim"), [((2, 3), False), ((-1,), True), ((0, 1, 2, 3), False), (1, True), ((3, 0), True)], ids=str
)
def test_a_mean_is_rounded_once(dims: tuple[int, ...] | int, keepdim: bool):
    x = torch.randn(3, 6, 5, 4)
    models = make(BACKEND, One(lambda m, x: F.relu(m.a(x)).mean(dims, keepdim) * 1.0, a=nn.Conv2d(6, 6, 1)), x)
    assert kernel_names(models[1])[1] == "mean as a sum in float"
    assert steps(models, x) <= 1.01 and steps(models, torch.randn(2, 6, 3, 7)) <= 1.01
    assert models[1](torch.randn(2, 6, 3, 7)).shape == torch.empty(2, 6, 3, 7).mean(dims, keepdim).shape


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 17)], ids=str)
def test_an_image_is_interleaved_as_it_is_rounded(channels: int, shape: tuple[int, int]):
    quantize = kernels.Quantize(QParams(0.02, 114, 0, 200, torch.uint8))
    for batch in (0, 1, 3):
        x = torch.randn(batch, channels, *shape)
        expected = (x / 0.02).round().add(114).clamp(0, 200).to(torch.uint8)
        for layout in (torch.contiguous_format, torch.channels_last):
            found = quantize(x.contiguous(memory_format=layout))
            assert torch.equal(found, expected)
            assert not 2 <= channels <= 4 or not batch or found.is_contiguous(memory_format=torch.channels_last)


def _residual(before: Callable[..., Tensor]) -> One:
    channels = 5
    return One(before, a=nn.Conv2d(channels, channels, 1), b=nn.Conv2d(channels, channels, 3, padding=1))


RESIDUALS = {
    "conv + x": lambda m, x: m.b(m.a(x)) + m.a(x),
    "x + conv": lambda m, x: m.a(x) + m.b(m.a(x)),
    "clamped": lambda m, x: (m.a(x) + m.b(m.a(x))).clamp(-0.1, 0.3),
    "ReLU": lambda m, x: F.relu(m.b(x) + m.a(x)),
    "of the model's input": lambda m, x: m.b(m.a(x)) + x,
}
#: Others read the residual, or the convolution itself does: it must not be written over.
READ_ELSEWHERE = {
    "its own input": lambda m, y: m.b(y) + y,
    "twice": lambda m, y: m.b(m.b(y) + y) + y,
    "later": lambda m, y: F.max_pool2d(m.b(y) + y, 2) + F.max_pool2d(y, 2),
    "returned": lambda m, y: torch.cat([m.b(y) + y, y], 1),
    "through a view": lambda m, y: (m.b(y) + y) * y.reshape(y.shape),
}


def test_a_residual_of_another_shape_than_the_examples():
    context = One(
        lambda m, x: m.e(F.relu(m.c(x)) + m.d(F.relu(m.c(x)).mean((-2, -1), keepdim=True))),
        c=nn.Conv2d(3, 8, 3, stride=2, padding=1), d=nn.Conv2d(8, 8, 1), e=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    models = make(BACKEND, context, torch.randn(8, 3, 2, 2))
    assert "onednn::qconv2d_pointwise + sum" in kernel_names(models[1])
    for shape in ((8, 3, 2, 2), (1, 3, 4, 4), (2, 3, 5, 9), (3, 7, 3)):
        assert steps(models, torch.randn(shape)) <= 2.01


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.Hardtanh(-0.2, 0.3)], ids=str)
def test_a_residual_of_another_rank_than_the_examples(activation: nn.Module):
    model = Two(lambda m, x, y: m.e(m.a(m.c(x) + y)), c=nn.Conv2d(3, 8, 1), a=activation, e=nn.Conv2d(8, 4, 1))
    models = make(BACKEND, model, torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4))
    shapes = [((2, 3, 4, 4), (8, 4, 4)), ((3, 4, 4), (2, 8, 4, 4)), ((3, 4, 4), (8, 4, 4)), ((2, 3, 4, 4), (8, 1, 1))]
    for x, y in shapes:
        x, y = torch.randn(x), torch.randn(y)
        assert models[1](x, y).shape == models[0](x, y).shape
        assert steps(models, x, y) <= 2.01


def test_threads_that_come_together_pack_no_more_than_there_is_room_for():
    made: list[torch.Size] = []

    def pack(shape: torch.Size) -> int:
        made.append(shape)
        time.sleep(0.02)
        return len(made)

    packed = by_shape(pack)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(packed, [torch.zeros(1 + number % 6) for number in range(12)]))
    assert len(made) == len(set(made)) == MAX_SHAPES


def test_what_is_packed_for_one_kind_never_stands_for_another():
    packed = by_shape(lambda shape: (shape[0], shape[0] % 2), lambda shape: shape[0] % 2)
    for size in (2, 4, 6, 8, 10, 3, 5, 10, 2):
        assert packed(torch.zeros(size))[1] == size % 2
    assert packed(torch.zeros(5)) == packed(torch.zeros(3)) == (3, 1)
    assert packed(torch.zeros(10)) == (2, 0)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)], ids=str)
@pytest.mark.parametrize("form", [*RESIDUALS, *READ_ELSEWHERE])
def test_residuals_are_summed_in_the_kernel(form: str, size: tuple[int, int]):
    if form == "later" and size == (1, 1):
        pytest.skip("nothing is left of it")
    elsewhere = READ_ELSEWHERE.get(form)
    model = _residual(RESIDUALS[form]) if elsewhere is None else _residual(lambda m, x: elsewhere(m, m.a(x)))
    x = torch.randn(3, 5, *size)
    models = make(BACKEND, model, x)
    assert any("+ sum" in name for name in kernel_names(models[1]))
    for batch in (3, 1, 0):
        x = torch.randn(batch, 5, *size)
        given = x.clone()
        # Between two kernels, a tie may fall to either side.
        assert steps(models, x) <= 2.01
        assert torch.equal(x, given)


def test_a_residual_that_must_be_broadcast_has_another_kernel():
    model = Two(lambda m, x, y: m.a(x) + y, a=nn.Conv2d(4, 4, 1))
    x, y = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 1, 1)
    models = make(BACKEND, model, x, y)
    assert kernel_names(models[1]) == ["quantized::conv2d", "quantized::add"]
    assert steps(models, x, y) <= 1.01


def test_a_residual_may_turn_out_to_be_broadcast_along_the_batch():
    models = make(BACKEND, Two(lambda m, x, y: m.a(x) + y, a=nn.Conv2d(4, 4, 1)), *torch.randn(2, 1, 4, 5, 5))
    assert "+ sum" in kernel_names(models[1])[0]
    for batches in ((3, 1), (1, 3), (3, 3)):
        x, y = (torch.randn(batch, 4, 5, 5) for batch in batches)
        given = y.clone()
        assert steps(models, x, y) <= 1.01 and torch.equal(y, given)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(m.a(x)[:, 1:4, ::2, 1:]),
        lambda m, x: m.b(m.a(x).transpose(2, 3)[:, :3]),
        lambda m, x: m.a(x)[:, ::2] + m.a(x)[:, 1::2],
        lambda m, x: m.a(x)[:, ::2] * m.a(x)[:, 1::2, :1, :1],
        lambda m, x: F.silu(m.a(x)[1:, 1:4, 1:]),
        lambda m, x: F.max_pool2d(m.a(x)[:, 1:4, ::2], 2),
        lambda m, x: F.interpolate(m.a(x)[:, 1:4], scale_factor=2.0),
        lambda m, x: F.avg_pool2d(m.a(x)[:, 1:4, :, ::2], 2),
    ],
)
def test_inputs_that_are_not_contiguous(function: Callable[..., Tensor]):
    x = torch.randn(3, 4, 9, 9)
    models = make(BACKEND, One(function, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(3, 5, 3)), x)
    assert steps(models, x) <= 2.01
    assert steps(models, torch.randn(1, 4, 8, 9).transpose(2, 3)) <= 2.01


@pytest.mark.parametrize(
    "function", [torch.sigmoid, F.hardsigmoid, torch.tanh, F.elu, F.silu, F.gelu], ids=lambda f: f.__name__
)
def test_tables_give_just_what_the_reference_does(function: Callable[[Tensor], Tensor]):
    models = make(BACKEND, One(lambda m, x: function(F.max_pool2d(x, 1) + x)), torch.randn(2, 4, 6, 6) * 3)
    assert kernel_names(models[1])[-1] == f"{function.__name__} by table"
    reference, converted = models
    for shape in ((2, 4, 6, 6), (1, 1, 1, 1), (1, 3, 5, 5), (0, 4, 6, 6), (1, 2, 3, 1)):
        x = torch.randn(shape) * 3
        # The sum before it may be one step off at a tie; the table itself is compared below.
        assert converted(x).shape == reference(x).shape
    table = next(module for module in converted.modules() if isinstance(module, LookupKernel))
    x = torch.arange(256).to(torch.uint8)
    for given in (x, x[1:], x[:255], x.view(1, 4, 8, 8).contiguous(memory_format=torch.channels_last), x[::3]):
        assert torch.equal(table(given), table.table[given.long()])


def test_the_same_model_without_quantized_kernels(monkeypatch: pytest.MonkeyPatch):
    """Plain arithmetic takes their place, once torch has them no longer."""
    for case in CASES:
        models = make(BACKEND, case.build(), *case.inputs(2))
        with monkeypatch.context() as patch:
            patch.setattr(shells, "HAS_QUANTIZED", False)
            bare = pickle.loads(pickle.dumps(models[1])), make(BACKEND, case.build(), *case.inputs(2))
            inputs = case.inputs(3)
            assert steps((models[0], bare[0]), *inputs) <= 2.01, case.name
            assert steps(bare[1], *inputs) <= 2.01, case.name


def test_several_threads_pack_at_once():
    case = next(case for case in CASES if case.name == "conv2d + add, residual read later")
    _, converted = make(BACKEND, case.build(), *case.inputs(2))
    inputs = [case.inputs(batch) for batch in (1, 2, 3)]
    expected = [converted(*given) for given in inputs]
    fresh = copy.deepcopy(converted)

    def call(number: int) -> bool:
        return all(
            torch.equal(fresh(*inputs[(number + turn) % 3]), expected[(number + turn) % 3]) for turn in range(12)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(8)))


def test_extreme_values_saturate_at_the_ends_of_the_range():
    quantize = kernels.Quantize(QParams(0.5, 3, 0, 255, torch.uint8))
    x = torch.tensor([float("inf"), 1e30, 126.0, 0.0, -1.5, -1e30, float("-inf")])
    assert quantize(x).tolist() == [255, 255, 255, 3, 0, 0, 0]
    narrow = kernels.Quantize(QParams(0.5, 3, 1, 100, torch.uint8))
    assert narrow(x).tolist() == [100, 100, 100, 3, 1, 1, 1]


def test_the_backend_says_what_it_runs_on():
    assert qcore_backend_info().name == BACKEND
    availability = qcore_probe()
    assert availability.ok
    assert ("no VNNI" in availability.isa) != kernels.has_vnni()


@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 8), nn.Conv1d(16, 8, 1), nn.Conv2d(16, 8, 1)], ids=lambda x: type(x).__name__
)
def test_of_zeros_float_results_are_just_the_bias(layer: nn.Module) -> None:
    """Not nearly: a model that normalises the rows of such a result makes of any remainder a vector of length one."""
    shape = {nn.Linear: (3, 16), nn.Conv1d: (3, 16, 5), nn.Conv2d: (3, 16, 5, 5)}[type(layer)]  # type: ignore[index]
    x = torch.randn(shape) + 0.3
    prepared = qcore.prepare_fx(layer.eval(), qcore.get_default_qconfig_mapping(BACKEND), (x,))
    qcore.calibrate(prepared, [x])
    converted = qcore.convert_fx(prepared)
    (kernel,) = (module for module in converted.modules() if isinstance(module, (kernels.QConv, kernels.QLinear)))
    assert kernel.qparams("input")[1] != 0
    assert kernel.gives_float
    with torch.no_grad():
        assert torch.equal(converted(torch.zeros(shape)), layer(torch.zeros(shape)))
