"""Suites for backends on this library: the core's conformance suite, and what such backends promise beyond it.

from qcore_torch_kernels.testing import EngineSuite, TorchKernelsConformance

class TestConformance(TorchKernelsConformance):
    backend = "mychip"

class TestKernels(EngineSuite):
    backend = "mychip"
"""

import copy
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcore
from qcore.dtypes import QScheme
from qcore.fx.graph_module import QGraphModule
from qcore.observer import MinMaxObserver, PerChannelMinMaxObserver
from qcore.testing import CASES, BackendConformance, Case, ask_by_name, steps_apart
from qcore_torch_kernels.engines import supported_engines
from qcore_torch_kernels.graph import replayed_kinds
from qcore_torch_kernels.pair_limited import PAIR_LIMIT, PairLimitedPerChannelMinMaxObserver, largest_pair_sum

_WARNS_NOBODY = """
import torch, qcore
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
x = torch.randn(1, 3, 6, 6)
prepared = qcore.prepare_fx(model.eval(), qcore.get_default_qconfig_mapping({backend!r}), (x,), backend={backend!r})
prepared(x)
qcore.convert_fx(prepared)(x)
"""


class TorchKernelsConformance(BackendConformance):
    """The core's suite, and that calls are replayed. Subclass it in a test module and name the backend.

    Attributes:
        replays: whether all kernels are ``replayable``, so that recordings stand for calls.
    """

    replays: ClassVar[bool] = True

    def check_after_calls(self, converted: nn.Module) -> None:
        """From the third call of a kind on, a recording is replayed."""
        assert isinstance(converted, QGraphModule)
        assert replayed_kinds(converted) == int(self.replays)


class Calling(nn.Module):
    """A function of the module itself and its inputs, with the layers that it uses."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)


class One(Calling):
    """Of one input."""

    def forward(self, x: Tensor) -> Tensor:
        """What the function gives."""
        return self.function(self, x)


class Two(Calling):
    """Of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the function gives."""
        return self.function(self, x, y)


def _one_of_two(function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A function of what two convolutions give."""
    return One(lambda m, x: function(m.a(x), m.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))


def make(
    backend: str, model: nn.Module, *inputs: Tensor, mapping: qcore.QConfigMapping | None = None
) -> tuple[QGraphModule, nn.Module]:
    """The reference model and the converted one.

    Args:
        backend: its name.
        model: of floats.
        inputs: to prepare and calibrate it with.
        mapping: the default is the backend's, with sums and products asked for by name.
    """
    mapping = ask_by_name(qcore.get_default_qconfig_mapping(backend)) if mapping is None else mapping
    prepared = qcore.prepare_fx(model.eval(), mapping, inputs, backend=backend, on_unsupported="ignore")
    with torch.no_grad():
        prepared(*inputs)
    reference = qcore.convert_to_reference_fx(prepared)
    assert isinstance(reference, QGraphModule)
    return reference, qcore.convert_fx(prepared)


def steps(models: tuple[QGraphModule, nn.Module], *inputs: Tensor) -> float:
    """How far a converted model is from its reference, in steps of the output."""
    reference, converted = models
    with torch.no_grad():
        return steps_apart(reference, reference(*inputs), converted(*inputs))[0]


def kernel_names(converted: nn.Module) -> list[str]:
    """The kernels that the plan names, in order."""
    return [decision.kernel for decision in qcore.explain(converted).quantized]


class KernelSuite:
    """Holds for every backend on torch's kernels.

    Attributes:
        backend: its name.
        left_float: names of the cases that it computes in float on purpose; the plan says why.
    """

    backend: ClassVar[str]
    left_float: ClassVar[frozenset[str]] = frozenset({"conv2d padding same, even kernel"})

    @pytest.fixture(autouse=True)
    def _put_back_what_is_global(self) -> Iterator[None]:
        availability = qcore.get_backend(self.backend).availability
        if not availability.ok:
            pytest.skip(availability.reason)
        engine, threads = torch.backends.quantized.engine, torch.get_num_threads()
        torch.manual_seed(0)
        yield
        torch.backends.quantized.engine = engine
        torch.set_num_threads(threads)

    def make(
        self, model: nn.Module, *inputs: Tensor, mapping: qcore.QConfigMapping | None = None
    ) -> tuple[QGraphModule, nn.Module]:
        """See the function of this name."""
        return make(self.backend, model, *inputs, mapping=mapping)

    def _side_by_side(self) -> tuple[list[nn.Module], list[tuple[Tensor, ...]], list[Tensor]]:
        inputs = [case.inputs(2) for case in CASES[:8]]
        models = [self.make(case.build(), *given)[1] for case, given in zip(CASES[:8], inputs, strict=True)]
        return models, inputs, [model(*given) for model, given in zip(models, inputs, strict=True)]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_every_engine_gives_the_same_bits(self, case: Case) -> None:
        """In every layout, and whichever engine is set while weights are packed."""
        if case.name in self.left_float:
            pytest.skip("in float layouts may differ in the last bit")
        _, converted = self.make(case.build(), *case.inputs(2))
        results = []
        inputs = case.inputs(3)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = [x.contiguous(memory_format=layout if x.dim() == 4 else torch.contiguous_format) for x in inputs]
            for engine in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = engine
                # The copy packs its weights anew, while another engine is set.
                results += [model(*given) for model in (converted, copy.deepcopy(converted))]
                assert torch.backends.quantized.engine == engine
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_what_is_quantized_has_a_kernel(self, case: Case) -> None:
        """But what is float on purpose."""
        _, converted = self.make(case.build(), *case.inputs(2))
        for decision in qcore.explain(converted).quantized:
            assert case.name in self.left_float or (decision.kernel and not decision.reason)

    def test_no_warning_about_quantized_dtypes_reaches_the_user(self) -> None:
        """Torch warns once in a process, so it takes a fresh one."""
        script = _WARNS_NOBODY.format(backend=self.backend)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def test_the_process_keeps_its_warning_filters(self) -> None:
        """However weights are packed."""
        before = list(warnings.filters)
        self.make(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))[1](torch.randn(2, 4))
        assert warnings.filters == before

    def test_models_are_packed_and_run_side_by_side_whatever_the_engine_is(self) -> None:
        """All threads meet the same unpacked models."""
        made, inputs, expected = self._side_by_side()
        for engine in supported_engines():
            torch.backends.quantized.engine = engine
            fresh = copy.deepcopy(made)

            def call(number: int, fresh: list[nn.Module] = fresh) -> bool:
                place = number // 4
                return torch.equal(fresh[place](*inputs[place]), expected[place])

            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(call, range(32)))
            assert torch.backends.quantized.engine == engine

    def test_models_run_side_by_side_while_the_engine_changes(self) -> None:
        """A packed weight remembers its engine."""
        made, inputs, expected = self._side_by_side()
        engines = supported_engines()

        def call(number: int) -> bool:
            torch.backends.quantized.engine = engines[number % len(engines)]
            place = number % len(made)
            return torch.equal(made[place](*inputs[place]), expected[place])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(64)))

    @pytest.mark.parametrize(
        "name",
        ["conv2d 3x3", "conv2d grouped", "conv2d depthwise 3x3", "conv2d + add", "linear", "add", "mul", "sigmoid"],
    )
    def test_4_threads_give_the_same_bits(self, name: str) -> None:
        """As one does."""
        (case,) = [case for case in CASES if case.name == name]
        _, converted = self.make(case.build(), *case.inputs(2))
        inputs = case.inputs(8)
        torch.set_num_threads(1)
        expected = converted(*inputs)
        torch.set_num_threads(4)
        assert torch.equal(converted(*inputs), expected)

    @pytest.mark.parametrize(
        ("model", "shape"),
        [
            (nn.Conv1d(4, 4, 3), (4, 6)),
            (nn.Conv2d(4, 5, 3, padding=1), (4, 6, 7)),
            (nn.Conv2d(8, 8, 3, groups=8), (8, 6, 7)),
            (nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
            (nn.Linear(8, 3), (8,)),
            (nn.ConvTranspose2d(4, 3, 2, stride=2), (4, 5, 3)),
            (nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)), (4, 6, 6)),
            (One(lambda m, x: m.b(m.a(x)) + m.a(x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), (4, 5, 5)),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
    )
    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=str)
    def test_inputs_without_a_batch(self, model: nn.Module, shape: tuple[int, ...], activation: nn.Module) -> None:
        """Kernels that take batches only get one."""
        x = torch.randn(shape)
        assert steps(self.make(nn.Sequential(model, activation), x), x) <= 2.01

    @pytest.mark.parametrize(
        "function",
        [
            lambda a, b: a.transpose(2, 3) + b,
            lambda a, b: a.transpose(2, 3) * b,
            lambda a, b: a[:, 1:3] + b[:, :2],
            lambda a, b: a[:, 1:3, ::2] * b[:, :2, 1::2],
            lambda a, b: a[:, ::2] * b[:, 1::2, :1, :1],
            lambda a, b: a + b[0],
            lambda a, b: torch.sigmoid(F.adaptive_avg_pool2d(b, 1)) * a,
            lambda a, b: torch.cat([a, b, a.transpose(2, 3)], 1),
            lambda a, b: torch.stack([a[:, 1:3, ::2], b[:, :2, 1::2]], -2).clamp(-0.5, 0.25),
            lambda a, b: F.pad(a[:, 1:3, ::2], (1, -1), mode="constant"),
            lambda a, b: F.pad(a[:, 1:3, ::2], (1, 1, 2, 0), mode="reflect"),
            lambda a, b: F.max_pool2d(a[:, 1:3], 2, padding=1),
            lambda a, b: F.avg_pool2d(a[:, 1:4, :, ::2], 2),
            lambda a, b: F.interpolate(a[:, 1:4], scale_factor=2.0),
            lambda a, b: F.silu(a[1:, 1:4, 1:]),
        ],
    )
    def test_views_and_mixed_layouts(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Each convolution before may be one step off."""
        x = torch.randn(2, 4, 6, 6)
        models = self.make(_one_of_two(function), x)
        assert steps(models, x) <= 4
        assert steps(models, torch.randn(3, 4, 6, 6).transpose(2, 3)) <= 4

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("function", [torch.add, torch.mul])
    def test_two_layouts_at_once(self, function: Callable[..., Tensor], layout: torch.memory_format) -> None:
        """Of the inputs of one kernel."""
        x, y = torch.randn(2, 2, 5, 6, 7)
        x = x.contiguous(memory_format=torch.channels_last)
        models = self.make(Two(lambda m, x, y: function(x, y)), x, y)
        assert steps(models, x, y.contiguous(memory_format=layout)) <= 1.01

    @pytest.mark.parametrize(
        ("joined", "width"),
        [
            (lambda a, b: torch.cat([a, b], 1), 6),
            (lambda a, b: torch.cat([a, a, b], -1), 18),
            (lambda a, b: torch.stack([a, b], 2), 6),
            (lambda a, b: torch.cat([a, b], 1).clamp(-0.2, 0.4), 6),
        ],
    )
    def test_integers_are_joined_as_they_are(self, joined: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        """Nothing is rounded once more, and a clamp after it isn't lost."""
        layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1), "end": nn.Linear(width, 3)}
        x = torch.randn(2, 4, 6, 6)
        models = self.make(One(lambda m, x: m.end(joined(m.a(x), m.b(x))), **layers), x)
        for given in (x, 10 * x):
            assert steps(models, given) <= 3
        decisions = {decision.operators[0]: decision.kernel for decision in qcore.explain(models[1]).quantized}
        assert decisions.get("cat", decisions.get("stack")) in ("joined integers", "integers as they are")

    @pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
    @pytest.mark.parametrize(
        ("kind", "shape"), [(nn.Conv1d, (2, 4, 5)), (nn.Conv2d, (2, 4, 5, 5)), (nn.Conv3d, (2, 4, 3, 4, 5))]
    )
    def test_nearest_neighbours_are_taken_on_integers(
        self, kind: type[nn.Conv2d], shape: tuple[int, ...], mode: str
    ) -> None:
        """Nothing is rounded once more."""
        for arguments in ({"scale_factor": 2}, {"size": [7, 3, 4][: len(shape) - 2]}):
            x = torch.randn(shape)
            models = self.make(nn.Sequential(kind(4, 4, 1), nn.Upsample(**arguments, mode=mode)), x)
            assert kernel_names(models[1])[-1] == "interpolate on integers"
            assert steps(models, x) <= 1.01

    def test_a_scale_for_each_channel_leaves_the_layout_alone(self) -> None:
        """The larger factor's is the result's."""
        x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
        models = self.make(_one_of_two(lambda a, b: F.hardsigmoid(F.adaptive_avg_pool2d(b, 1)) * a), x)
        assert models[1](x).is_contiguous(memory_format=torch.channels_last)
        assert steps(models, x) <= 2

    @pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 1), nn.Linear(4, 6)], ids=str)
    @pytest.mark.parametrize("size", [1e-38, 1e-36, 1e-20, 1e-6, 1e10])
    def test_values_of_any_size(self, module: nn.Module, size: float) -> None:
        """What a kernel can't take is computed in float."""
        x = size * (torch.randn(2, 4, 5, 5) if isinstance(module, nn.Conv2d) else torch.randn(3, 4))
        model = copy.deepcopy(module)
        with torch.no_grad():
            model.get_parameter("bias").mul_(size)
        assert steps(self.make(nn.Sequential(model), x), x) <= 1.01

    def test_two_models_of_other_scales_may_share_weights(self) -> None:
        """A module that is called twice is two kernels."""
        layer = nn.Linear(8, 8)
        x = 3 * torch.randn(5, 8)
        assert steps(self.make(nn.Sequential(layer, nn.Hardtanh(-1, 1), layer), x), x) <= 3


class EngineSuite(KernelSuite):
    """Holds for a backend whose kernels are those of :mod:`qcore_torch_kernels.weighted` on one engine.

    Attributes:
        linear: the end of the name of a linear layer's kernel at the end of a model.
        transposed: of how many dimensions its transposed convolutions are.
    """

    linear: ClassVar[str] = "linear"
    transposed: ClassVar[int] = 3

    @pytest.mark.parametrize("activation", ["SiLU", "GELU"])
    def test_what_has_no_kernel_stays_float_and_the_plan_says_so(self, activation: str) -> None:
        """The backend has no pattern for it."""
        _, converted = self.make(nn.Sequential(nn.Linear(8, 8), getattr(nn, activation)()), torch.randn(2, 8))
        (decision,) = [d for d in qcore.explain(converted).decisions if not d.quantized]
        assert decision.reason == f"{self.backend} has no pattern for it"

    def test_names_of_kernels_say_what_they_compute(self) -> None:
        """The ReLU is the lower end of the convolution's range."""
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        _, converted = self.make(model, torch.randn(2, 4, 6, 6))
        title = self.backend.upper()
        assert kernel_names(converted) == [f"{title} conv2d", "integers as they are", f"{title} {self.linear}"]

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [(nn.Conv1d(4, 4, 1), (2, 4, 9)), (nn.Conv3d(4, 4, 1), (2, 4, 3, 3, 3)), (nn.Linear(4, 4), (9, 4))],
        ids=str,
    )
    def test_a_relu_in_the_middle_of_a_range_is_the_kernels(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        """The kernel cuts at zero by itself."""
        weight = PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_channel_symmetric)
        activation = MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric)
        mapping = qcore.QConfigMapping().set_global(qcore.QConfig(activation, weight))
        x = torch.randn(shape)
        models = self.make(nn.Sequential(layer, nn.ReLU()), x, mapping=mapping)
        assert steps(models, x) <= 1.01
        (name,) = kernel_names(models[1])
        assert name.endswith("_relu")

    @pytest.mark.parametrize("dimensions", [1, 2, 3])
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_transposed_convolutions(self, dimensions: int, groups: int, batch: int) -> None:
        """Those of more dimensions stay float."""
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
        shape = (2, 8, 5, 6, 4)[: 2 + dimensions]
        model = nn.Sequential(kind(8, 16, 3, stride=2, padding=1, output_padding=1, groups=groups), nn.ReLU())
        models = self.make(model, torch.randn(shape))
        assert steps(models, torch.randn(batch, *shape[1:])) <= 1.01
        if dimensions <= self.transposed:
            (name,) = kernel_names(models[1])
            assert name == f"{self.backend.upper()} conv_transpose{dimensions}d"
        else:
            decision = qcore.explain(models[1]).decisions[0]
            assert not decision.quantized and decision.reason == f"{self.backend} has no pattern for it"

    @pytest.mark.parametrize("dimensions", [1, 2, 3])
    def test_transposed_convolutions_at_the_ends_of_the_ranges(self, dimensions: int) -> None:
        """No sum saturates."""
        model = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1](8, 4, 3)
        nn.init.constant_(model.weight, 0.5)
        x = torch.ones((2, 8, 5, 6, 4)[: 2 + dimensions])
        assert steps(self.make(nn.Sequential(model), x), x) <= 1.01

    def test_a_batch_norm_after_a_transposed_convolution_is_folded(self) -> None:
        """As after any."""
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU6())
        x = torch.randn(2, 4, 5, 5)
        models = self.make(model, x)
        assert steps(models, x) <= 1.01
        assert all(decision.quantized for decision in qcore.explain(models[1]).decisions)


class _Unknown(PerChannelMinMaxObserver):
    """A weight observer that no backend knows, so that none can put its own in its place."""


#: A weight's shape and groups: plain, pointwise, grouped and depthwise kernels, and linear layers.
LAYERS = [
    ((8, 3, 3, 3), 1),
    ((32, 5, 2, 2), 1),
    ((8, 17, 1, 1), 1),
    ((8, 1, 3, 3), 1),
    ((16, 8, 2, 2), 2),
    ((12, 3, 3, 3), 4),
    ((16, 4, 3, 3), 4),
    ((8, 1, 3, 3), 8),
    ((16, 1, 3, 3), 8),
    ((8, 1, 5, 5), 8),
    ((17, 1, 3, 3), 17),
    ((8, 1, 4, 4), 8),
    ((8, 5, 3), 1),
    ((8, 1, 5), 8),
    ((16, 3, 2, 2, 2), 1),
    ((8, 1, 3, 3, 3), 8),
    ((8, 33), 1),
    ((1, 12), 1),
]


def two_weights(shape: tuple[int, ...], value: int) -> Tensor:
    """Weights that are ``value`` at two places and 0 elsewhere, for all pairs of places: (pairs, *shape[1:])."""
    number = math.prod(shape[1:])
    places = torch.tensor(list(itertools.combinations(range(number), 2)))
    return torch.zeros(len(places), number, dtype=torch.int8).scatter_(1, places, value).view(-1, *shape[1:])


class SaturationSuite:
    """Holds for a backend whose kernels add pairs of products in 16 bits.

    Attributes:
        backend: its name.
        observer: its own observer, as on a CPU where all kernels do.
    """

    backend: ClassVar[str]
    observer: ClassVar[type[PairLimitedPerChannelMinMaxObserver]]

    def adds_pairs(self, is_depthwise: bool) -> bool:
        """Whether a kernel on this CPU does."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _is_available(self) -> None:
        availability = qcore.get_backend(self.backend).availability
        if not availability.ok:
            pytest.skip(availability.reason)

    @pytest.mark.parametrize("rounding", ["nearest", "sum_preserving"])
    @pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
    def test_the_observer_grows_only_channels_that_need_it(
        self, shape: tuple[int, ...], groups: int, rounding: str
    ) -> None:
        """By no more than it takes: the pair that made a channel grow comes close to the bound."""
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        weight[0] = 1.0
        if len(weight) > 1:
            weight[1] = 0
            weight[1].view(-1)[0] = 1.0
        arguments: dict[str, Any] = {
            "dtype": torch.int8,
            "qscheme": QScheme.per_channel_symmetric,
            "rounding": rounding,
        }
        plain, own = PerChannelMinMaxObserver(**arguments), self.observer(**arguments)
        plain(weight), own(weight)
        before, after = (largest_pair_sum(self.observer.pairs(found.quantize(weight))) for found in (plain, own))
        growth = own.calculate_qparams()[0] / plain.calculate_qparams()[0]
        assert (after <= PAIR_LIMIT).all()
        assert torch.equal(growth > 1, before > PAIR_LIMIT) and float(growth.max()) < 2.1
        assert (after[growth > 1] >= PAIR_LIMIT - 4).all()
        assert (growth[0] > 1.9) == (before[0] == 254)

    def converted(self, model: nn.Module, x: Tensor, activation: Any = MinMaxObserver) -> tuple[str, float, nn.Module]:
        """A layer whose weight is observed by what no backend knows.

        Args:
            model: the layer.
            x: its input.
            activation: the observer of activations.

        Returns:
            The reason in the plan, the distance from the reference in steps, and the converted model.
        """
        weight = _Unknown.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)
        mapping = qcore.QConfigMapping().set_global(qcore.QConfig(activation, weight))
        models = make(self.backend, nn.Sequential(model), x, mapping=mapping)
        (decision,) = qcore.explain(models[1]).quantized
        return decision.reason, steps(models, x), models[1]

    @pytest.mark.parametrize("is_depthwise", [False, True])
    def test_what_could_saturate_is_declined_and_right(self, is_depthwise: bool) -> None:
        """Where the kernel adds pairs."""
        layer = nn.Conv2d(8, 8, 3, groups=8 if is_depthwise else 1)
        nn.init.constant_(layer.weight, 0.5)
        reason, apart, _ = self.converted(layer, torch.rand(2, 8, 5, 5))
        assert ("could saturate" in reason) == self.adds_pairs(is_depthwise)
        assert apart <= 1.01

    def test_activations_of_7_bits_take_weights_of_8(self) -> None:
        """Their products can't leave 16 bits."""
        layer = nn.Conv2d(8, 8, 3)
        nn.init.constant_(layer.weight, 0.5)
        reason, apart, _ = self.converted(layer, torch.rand(2, 8, 5, 5), MinMaxObserver.with_args(reduce_range=True))
        assert not reason and apart <= 1.01
