"""Backends side by side in one process, and the process's quantized engine, which must not matter."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore.plugins.manager import backend_names
from qcore.testing import CASES, steps_apart

ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


@contextlib.contextmanager
def engine(name):
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def usable_backends():
    return [name for name in backend_names() if qcore.get_backend(name).availability.ok]


def converted(backend, case):
    torch.manual_seed(0)
    model = case.build().eval()
    inputs = case.inputs(2)
    mapping = qcore.get_default_qconfig_mapping(backend)
    prepared = qcore.prepare_fx(model, mapping, inputs, on_unsupported="ignore")
    with torch.no_grad():
        prepared(*inputs)
    return qcore.convert_fx(prepared), inputs


@pytest.mark.skipif(not ENGINES, reason="this torch has no quantized engines")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_engine_of_the_process_changes_no_bit(installed_backend, case):
    """Neither the engine at conversion, nor that of the first call, nor that of later calls."""
    results = {layout: [] for layout in (torch.contiguous_format, torch.channels_last)}
    for name in (ENGINES[0], ENGINES[-1]):
        with engine(name):
            model, inputs = converted(installed_backend, case)
            for other in ENGINES:
                with engine(other), torch.no_grad():
                    for layout, found in results.items():  # Some kernels look at how a tensor lies in memory.
                        found.append(
                            model(*(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in inputs))
                        )
            assert torch.backends.quantized.engine == name
    for found in results.values():
        assert all(torch.equal(result, found[0]) for result in found)


def test_backends_are_packed_and_run_side_by_side_in_threads():
    case = next(case for case in CASES if case.name == "conv2d + add, swapped, + ReLU")
    models = {name: converted(name, case) for name in usable_backends()}
    with torch.no_grad():
        expected = {name: model(*inputs) for name, (model, inputs) in models.items()}
    names = list(models)
    # What a kernel packs isn't copied, so each of these packs for an engine of its own while its neighbours do.
    fresh = [(name, copy.deepcopy(models[name][0])) for _ in range(25) for name in names]

    def call(job):
        name, model = job
        with torch.no_grad():
            return all(torch.equal(model(*models[name][1]), expected[name]) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, fresh))


def test_models_of_all_backends_agree():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
    ).eval()
    batches = [torch.randn(4, 3, 12, 12) for _ in range(4)]
    expected = model(batches[0])
    for backend in usable_backends():
        prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), (batches[0],))
        qcore.calibrate(prepared, batches)
        error = qcore.convert_fx(prepared)(batches[0]) - expected
        assert error.norm() < 0.05 * expected.norm(), backend


class Small(nn.Module):
    """A network whose values are all about as large as its input's."""

    def __init__(self, unit):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)
        for layer in (self.a, self.b, self.linear):
            layer.bias.data *= unit

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(x) + x
        x = F.avg_pool2d(torch.cat([x, F.leaky_relu(x)], 2), 2)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("observer", [qcore.HistogramObserver, qcore.MinMaxObserver, None])
def test_no_floor_lies_under_the_scales_of_small_activations(installed_backend, observer):
    torch.manual_seed(0)
    unit = 1e-9  # Far below float32's epsilon.
    model, x = Small(unit).eval(), torch.randn(8, 3, 9, 9) * unit
    mapping = qcore.get_default_qconfig_mapping(installed_backend)
    if observer is not None:
        mapping.set_global(qcore.QConfig(observer, mapping.global_qconfig.weight))
    prepared = qcore.prepare_fx(model, mapping, (x,), on_unsupported="error")
    prepared(x)
    with torch.no_grad():
        expected, found = model(x), qcore.convert_fx(prepared)(x)
    assert (found - expected).double().norm() < 0.1 * expected.double().norm()  # 20 dB


def test_steps_are_counted_of_outputs_that_have_a_gradient():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping("reference"), (x,))
    prepared(x)
    reference = qcore.convert_to_reference_fx(prepared)
    expected = reference(x.requires_grad_())
    apart, step = steps_apart(reference, expected.requires_grad_(), expected + 0.5)
    assert apart * step == pytest.approx(0.5)


class Shapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        x = self.b(self.a(x))
        n, _, h, w = x.shape
        first, second = x.chunk(2, 1)
        return self.c(torch.cat([second, first], x.dim() - 3).reshape(n, x.size(1), h * w))


def test_no_value_is_made_float_only_for_its_shape(installed_backend):
    torch.manual_seed(0)
    x, other = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 2, 7)
    prepared = qcore.prepare_fx(Shapes().eval(), qcore.get_default_qconfig_mapping(installed_backend), (x,))
    qcore.calibrate(prepared, [x, other])
    reference, converted = qcore.convert_to_reference_fx(prepared), qcore.convert_fx(prepared)
    apart, _ = steps_apart(reference, reference(other), converted(other))
    assert apart <= 2.5
    if installed_backend == "reference":
        return
    plan = qcore.explain(converted)
    assert {d.kernel for d in plan.quantized if d.operators == ("chunk",)} == {"integers as they are"}
    called = [node for node in converted.graph.nodes if node.op == "call_module"]
    assert [node for node in called if "dequantize" in node.name] in ([], called[-1:])


BY_SHAPE = {
    "1x1": lambda: nn.Sequential(nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1)),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(16, 192, 1), nn.ReLU6(), nn.Conv2d(192, 192, 3, padding=1, groups=192)
    ),
    "3x3": lambda: nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Hardswish(), nn.Conv2d(32, 8, 3, stride=2)),
    "linear": lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 30)),
}
SHAPES = [(1, 16, 3), (1, 16, 33), (2, 16, 7), (1, 16, 14), (2, 16, 28), (5, 16, 5), (1, 16, 40), (3, 16, 6)]


@torch.no_grad()
@pytest.mark.parametrize("name", BY_SHAPE)
def test_the_shapes_that_came_before_change_no_bit(installed_backend, name):
    """What a kernel packs for a shape, and which kernel it is, depends on that shape only."""
    model = BY_SHAPE[name]().eval()
    inputs = [torch.randn(*shape, shape[-1]).movedim(1, -1 if name == "linear" else 1) for shape in SHAPES]
    mapping = qcore.get_default_qconfig_mapping(installed_backend)
    prepared = qcore.prepare_fx(model, mapping, (inputs[0],), backend=installed_backend)
    qcore.calibrate(prepared, inputs)
    converted = qcore.convert_fx(prepared)
    expected = [copy.deepcopy(converted)(x) for x in inputs]
    for turn in range(len(inputs)):
        order = [(turn + step * (3 if turn % 2 else 1)) % len(inputs) for step in range(len(inputs))]
        used = copy.deepcopy(converted)
        for number in order * 4:  # Written out, recorded and replayed.
            assert torch.equal(used(inputs[number]), expected[number])
