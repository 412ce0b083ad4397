"""The conformance suite: a pytest class that holds a backend to the reference model and to what it claims."""

import copy
import io
import operator
import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qcore import ops
from qcore.backend_config import BackendConfig, DTypeConfig, DTypeWithConstraints
from qcore.dtypes import QScheme
from qcore.errors import ExampleInputsError
from qcore.fx.calls import as_written
from qcore.fx.graph_module import QGraphModule, get_attribute
from qcore.fx.operators import pattern_keys
from qcore.fx.patterns import config_problems
from qcore.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from qcore.plugins.manager import get_backend
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import QConfigMapping
from qcore.quantization_plan import Decision
from qcore.quantize_fx import convert_fx, convert_to_reference_fx, explain, get_default_qconfig_mapping, prepare_fx
from qcore.testing.cases import CASES, EXTREME_CASES, Case, behind
from qcore.testing.process import process_left_alone

_PER_TENSOR = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)


class _Unknown(PerChannelMinMaxObserver):
    """A weight observer that no backend knows, so that none can put its own in its place."""


def _per_channel(observer: type[PerChannelMinMaxObserver]) -> Any:
    return observer.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric)


_WEIGHT_OBSERVERS = {
    "per channel": (QScheme.per_channel_symmetric, _per_channel(PerChannelMinMaxObserver)),
    "per tensor": (QScheme.per_tensor_symmetric, _PER_TENSOR),
    "unknown": (QScheme.per_channel_symmetric, _per_channel(_Unknown)),
}


def ask_by_name(mapping: QConfigMapping) -> QConfigMapping:
    """A mapping with rules of their own for sums and products: asked for by name, they are quantized between floats.

    Args:
        mapping: it isn't changed.
    """
    named = copy.deepcopy(mapping)
    for function in (operator.add, operator.mul, torch.add, torch.mul):
        if function not in named.object_type_qconfigs:
            named.set_object_type(function, named.global_qconfig)
            named.default_types |= {function}  # A model may as well have none of them.
    return named


def steps_apart(reference: QGraphModule, expected: Tensor, found: Tensor) -> tuple[float, float]:
    """How far two outputs lie apart, in steps of the reference model's output, and the size of a step.

    Args:
        reference: the reference model, of one output; if that isn't a dequantized value, a step is a thousandth of the
            range.
        expected: its output.
        found: the output to compare.
    """
    expected, found = expected.detach(), found.detach()
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, the reference gives {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0, 1.0
    step = _step(reference, _results(reference)[0], expected)
    return float((expected - found).abs().max()) / step, step


def _results(reference: QGraphModule) -> list[str]:
    """For each output of a model where its scale is; empty if it comes from a float operator."""
    (outputs,) = next(node for node in reversed(reference.graph.nodes) if node.op == "output").args
    given = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [_scale(node) if getattr(node, "target", None) is ops.dequantize_per_tensor else "" for node in given]


def _scale(node: Any) -> str:
    """Where the scale of a quantize or dequantize is."""
    return str(node.args[1].target)


def _step(reference: QGraphModule, scale: str, expected: Tensor) -> float:
    step = float(get_attribute(reference, scale)) if scale else float(expected.abs().max()) / 1000
    return step or 1.0


def _handed_on(reference: QGraphModule) -> float:
    """What a difference of one step in every intermediate result may come to, as a real number."""
    made = [node for node in reference.graph.nodes if node.target is ops.quantize_per_tensor]
    given = {_scale(node) for node in made if node.args[0].op == "placeholder"}
    between = {_scale(node) for node in made} - given - set(_results(reference))
    return sum(float(get_attribute(reference, scale)) for scale in between)


def _inputs(reference: QGraphModule, case: Case, batch: int) -> tuple[Tensor, ...]:
    """Random inputs, none of which lies so near the middle between two steps that it may be rounded either way."""
    inputs = list(case.inputs(batch))
    for number, node in enumerate(node for node in reference.graph.nodes if node.op == "placeholder"):
        for reader in node.users:
            if reader.target is ops.quantize_per_tensor:
                scale = get_attribute(reference, str(getattr(reader.args[1], "target", ""))).double()
                steps = inputs[number].double() / scale
                middle = (steps - steps.floor() - 0.5).abs() < 0.01
                inputs[number] = torch.where(middle, (steps + 0.02) * scale, inputs[number]).to(torch.float32)
    return tuple(inputs)


def _bias(expected: Tensor, found: Tensor) -> float:
    """The largest mean difference, with its sign, among all, the positive and the negative values; of 16 at least."""
    difference = (found - expected).double()
    parts = [difference[chosen] for chosen in (expected == expected, expected > 0, expected < 0)]
    return max((abs(float(part.mean())) for part in parts if part.numel() >= 16), default=0.0)


def _layouts(inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The same inputs as they may lie in memory; expanded ones have other values."""

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 1]

    def turned(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x

    def channels_last(x: Tensor) -> Tensor:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x

    def expanded(x: Tensor) -> Tensor:
        return x[:1].expand_as(x)

    for change in (strided, turned, channels_last, expanded):
        yield change.__name__, tuple(map(change, inputs))
    yield "channels_last beside contiguous", (*map(channels_last, inputs[:1]), *inputs[1:])


def _weighted(model: nn.Module) -> list[Decision]:
    """The decisions for operators with weights that are computed on integers."""
    return [decision for decision in explain(model).quantized if decision.weights]


def _claims(config: BackendConfig, decision: Decision, scheme: QScheme) -> list[DTypeConfig]:
    """What a backend says that it takes for an operator: integer activations, and weights of a scheme."""
    return [
        dtypes
        for pattern in config.configs
        if getattr(pattern_keys(pattern.pattern)[0], "name", "") == decision.operators[0]
        and (pattern.condition.name if pattern.condition else "") in ("", decision.condition)
        for dtypes in pattern.dtype_configs
        if not dtypes.is_dynamic
        and dtypes.input_constraints.dtype != torch.float32
        and scheme in (dtypes.weight_constraints.qschemes or (scheme,))
    ]


def _observer_for(constraints: DTypeWithConstraints) -> Any:
    """An activation observer of the dtype and scheme that a backend declares."""
    scheme = (constraints.qschemes or (QScheme.per_tensor_affine,))[0]
    return HistogramObserver.with_args(dtype=constraints.dtype or torch.uint8, qscheme=scheme)


class BackendConformance:
    """Subclass it in a test module and name the backend; ``pytest`` does the rest.

    Attributes:
        backend: the backend's name.
        tolerance: how many steps a kernel may differ from the reference model; chains of two roundings get one more.
        bias: how many steps its results may differ on average: roundings go both ways.
        lowers: whether there are kernels at all, and the answer of ``qcore_lower`` names them.
        declines: cases that the BackendConfig claims and that have no kernel nevertheless, with a part of the reason.
    """

    backend: ClassVar[str]
    lowers: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1.01
    bias: ClassVar[float] = 0.2
    declines: ClassVar[Mapping[str, str]] = {}
    _prepared: ClassVar[dict[tuple[Case, int], nn.Module]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._prepared = {}

    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        torch.manual_seed(0)
        with process_left_alone():
            availability = get_backend(self.backend).availability
        if not availability.ok:
            pytest.skip(availability.reason)

    def prepared(self, case: Case, mapping: QConfigMapping | None = None, seed: int = 0) -> nn.Module:
        """The calibrated model of a case; that of the default mapping is kept for other tests.

        Args:
            case: the case.
            mapping: in the place of the default one.
            seed: of weights and data; the data is the larger the larger it is.
        """
        key = case, seed
        if mapping is None and key in self._prepared:
            return self._prepared[key]
        own = ask_by_name(get_default_qconfig_mapping(self.backend) if mapping is None else mapping)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(seed)
            model = case.build().eval()
            inputs = case.inputs(2)
            prepared = prepare_fx(model, own, inputs, backend=self.backend, on_unsupported="ignore")
            for batch in (inputs, case.inputs(4)):
                prepared(*(x * (1 + seed) for x in batch))
        if mapping is None:
            self._prepared[key] = prepared
        return prepared

    def make(self, case: Case, mapping: QConfigMapping | None = None, seed: int = 0) -> tuple[QGraphModule, nn.Module]:
        """The reference model and the converted one of a case; arguments as above."""
        prepared = self.prepared(case, mapping, seed)
        reference = convert_to_reference_fx(prepared)
        assert isinstance(reference, QGraphModule)
        with process_left_alone():
            return reference, convert_fx(prepared)

    def run(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """A model's result; what it does besides is an error."""
        copies = [x.clone() for x in inputs]
        with torch.no_grad(), process_left_alone():
            found = model(*inputs)
        assert all(map(torch.equal, inputs, copies)), "the model writes into its inputs"
        return found

    def compare(
        self, reference: QGraphModule, converted: nn.Module, inputs: tuple[Tensor, ...], amplified: float = 1.5
    ) -> None:
        """Hold a converted model's results to the reference's: none is far off, and their mean isn't off.

        Args:
            reference: the reference model.
            converted: the converted one.
            inputs: of both; the reference gets them contiguous.
            amplified: by how much what follows an intermediate result may enlarge a step of it.
        """
        with torch.no_grad():
            expected = reference(*(x.contiguous() for x in inputs))
        found = self.run(converted, inputs)
        if isinstance(expected, Tensor):
            expected, found = (expected,), (found,)
        handed_on = amplified * _handed_on(reference)
        for number, want, have in zip(_results(reference), expected, found, strict=True):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            if want.numel() == 0:
                continue
            step = _step(reference, number, want)
            apart = float((have - want).abs().max()) / step
            assert apart <= self.tolerance + handed_on / step, f"a result is off by {apart:.3g} steps"
            off = _bias(want / step, have / step)
            assert off <= self.bias + 0.1 * handed_on / step, f"results are off by {off:.3g} steps on average"

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_a_kernel_computes_what_the_reference_does(self, case: Case) -> None:
        """For every operator and form, batches of other sizes than those calibrated on, and any layout in memory."""
        reference, converted = self.make(case)
        for batch in (2, 1, 8):
            self.compare(reference, converted, _inputs(reference, case, batch))
        for _, inputs in _layouts(_inputs(reference, case, 2)):
            self.compare(reference, converted, inputs)

    @pytest.mark.parametrize("views", [False, True], ids=["as they are", "as views"])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_integers_that_are_read_again_are_left_as_they_are(self, case: Case, views: bool) -> None:
        """A kernel overwrites nothing that is read after it, and reads integers however they lie in memory."""
        case = behind(case, views)
        try:
            reference, converted = self.make(case)
        except ExampleInputsError:
            pytest.skip("the float model takes no such views")
        for batch in (2, 3):
            self.compare(reference, converted, _inputs(reference, case, batch), amplified=6.0)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_what_the_backend_claims_ends_in_a_kernel(self, case: Case) -> None:
        """An operator that was quantized because of its BackendConfig isn't computed in float after all."""
        if not self.lowers:
            pytest.skip("the backend has no kernels that it names")
        _, converted = self.make(case)
        assert not self.without_kernel(case, converted)

    def without_kernel(self, case: Case, converted: nn.Module) -> list[str]:
        """What the plan has on integers and the lowering doesn't, unless the case is listed as declined."""
        return [
            f"{' + '.join(decision.operators)} is claimed and has no kernel: {decision.reason}"
            for decision in explain(converted).quantized
            if (not decision.kernel or "no kernel" in decision.reason)
            and self.declines.get(case.name, "not listed") not in decision.reason
        ]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_the_same_call_gives_the_same_bits(self, case: Case) -> None:
        """At every call, whatever was computed between, by a copy, and in another thread; and they stay as they are."""
        _, converted = self.make(case)
        first, second, larger = case.inputs(2), case.inputs(2), case.inputs(3)
        copied = copy.deepcopy(converted)
        with as_written():
            result = self.run(converted, first)
            expected = result.clone()
            others = [self.run(converted, inputs).clone() for inputs in (second, larger)]
            assert torch.equal(result, expected), "a later call changes the result of an earlier one"
            results = [self.run(converted, first) for _ in range(4)]
            for inputs, other in zip((larger, second), reversed(others), strict=True):
                assert torch.equal(self.run(copied, inputs), other), "a copy gives other bits"
            results.append(self.run(copied, first))
        with ThreadPoolExecutor(1) as pool:
            results.append(pool.submit(self.run, converted, first).result())
        assert all(torch.equal(result, expected) for result in results), "the same call gives other bits"

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_calls_of_one_kind_compute_the_same_bits(self, case: Case) -> None:
        """Whatever a backend keeps from earlier calls of the same shapes, it holds for any data."""
        _, converted = self.make(case)
        for _ in range(4):
            inputs = case.inputs(2)
            with torch.no_grad():
                found = self.run(converted, inputs)
                with as_written():
                    assert torch.equal(self.run(converted, inputs), found)
        self.check_after_calls(converted)

    def check_after_calls(self, converted: nn.Module) -> None:
        """More to hold of a model that was called four times with inputs of one kind; for suites made of this one."""

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_an_empty_batch_gives_an_empty_result(self, case: Case) -> None:
        """Of the shape that the float model gives, where that runs at all."""
        model, inputs = case.build().eval(), case.inputs(0)
        try:
            expected = model(*inputs)
        except (RuntimeError, IndexError):
            pytest.skip("the float model takes no empty batch")
        _, converted = self.make(case)
        assert converted(*inputs).shape == expected.shape

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_a_shape_that_the_float_model_refuses_is_refused(self, case: Case) -> None:
        """A kernel that reads on behind its input would give a result of whatever lies there."""
        model, inputs = case.build().eval(), case.inputs(2)
        _, converted = self.make(case)
        for dim in (1, -1):
            wrong = [torch.cat([x, x.narrow(min(dim, x.dim() - 1), 0, 1)], min(dim, x.dim() - 1)) for x in inputs]
            try:
                model(*wrong)
            except RuntimeError:
                with pytest.raises(RuntimeError), torch.no_grad():
                    converted(*wrong)

    @pytest.mark.parametrize("weight", _WEIGHT_OBSERVERS)
    @pytest.mark.parametrize("case", EXTREME_CASES, ids=lambda case: case.name)
    def test_nothing_saturates_at_the_ends_of_the_ranges(self, case: Case, weight: str) -> None:
        """Whatever observes the weights: a kernel is exact, or the lowering leaves the operator to float."""
        scheme, observer = _WEIGHT_OBSERVERS[weight]
        config = get_backend(self.backend).backend_config()
        plain = QConfigMapping().set_global(QConfig(HistogramObserver, observer))
        asked = [decision for decision in explain(self.prepared(case, plain)).decisions if decision.weights]
        claims = [claim for decision in asked for claim in _claims(config, decision, scheme)]
        if not claims:
            pytest.skip(f"the backend takes no {scheme.value} weights here")
        for activation in dict.fromkeys(_observer_for(claim.input_constraints) for claim in claims):
            mapping = QConfigMapping().set_global(QConfig(activation, observer))
            reference, converted = self.make(case, mapping)
            assert _weighted(reference), "nothing was quantized, although the BackendConfig claims it"
            self.compare(reference, converted, case.inputs(3))

    @pytest.mark.parametrize("case", EXTREME_CASES, ids=lambda case: case.name)
    def test_the_default_mapping_gives_kernels_at_the_ends_of_the_ranges(self, case: Case) -> None:
        """What the backend's own observers find, its kernels take."""
        reference, converted = self.make(case)
        if not _weighted(reference) and all("has no pattern for it" in d.reason for d in explain(reference).decisions):
            pytest.skip("the backend doesn't claim this operator")
        assert _weighted(reference), "the default mapping quantizes nothing, although the BackendConfig claims it"
        self.compare(reference, converted, case.inputs(3))
        assert not (self.lowers and self.without_kernel(case, converted))

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_copies_and_saved_models_compute_the_same_bits(self, case: Case) -> None:
        """Through deepcopy, pickle, and a file of the state_dict."""
        _, converted = self.make(case)
        inputs = case.inputs(2)
        expected = self.run(converted, inputs)
        assert torch.equal(self.run(copy.deepcopy(converted), inputs), expected)
        again = pickle.loads(pickle.dumps(converted))
        assert torch.equal(self.run(again, inputs), expected)
        file = io.BytesIO()
        torch.save(converted.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(self.run(again, inputs), expected)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_a_state_dict_makes_a_twin_the_same_model(self, case: Case) -> None:
        """Whatever weights and data the twin was made of, called or not: all that depends on them is in the state."""
        _, converted = self.make(case)
        _, other = self.make(case, seed=6)
        inputs = tuple(3 * x for x in case.inputs(2))
        with torch.no_grad():
            expected = converted(*inputs)
            for calls in (0, 4):
                twin = copy.deepcopy(other)
                for _ in range(calls):
                    twin(*inputs)
                twin.load_state_dict(converted.state_dict(), assign=calls > 0)
                for _ in range(4):
                    assert torch.equal(twin(*inputs), expected), "what a kernel computes isn't all in its state"

    def test_threads_compute_the_same_bits(self) -> None:
        """One model called by several threads at once, the first calls included."""
        case = next(case for case in CASES if case.name == "conv2d + add")
        _, converted = self.make(case)
        inputs = case.inputs(2)
        fresh = copy.deepcopy(converted)
        with torch.no_grad():
            expected = converted(*inputs)

        def call(_: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(fresh(*inputs), expected) for _ in range(20))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(8)))

    def test_the_saved_state_is_plain_tensors(self) -> None:
        """No quantized dtype and no packed object is saved."""
        for name in ("conv2d + add", "linear"):
            _, converted = self.make(next(case for case in CASES if case.name == name))
            for value in converted.state_dict().values():
                assert isinstance(value, Tensor) and not value.is_quantized

    def test_the_backend_config_is_well_formed(self) -> None:
        """Every pattern is one that a graph can hold."""
        config = get_backend(self.backend).backend_config()
        assert config.configs
        assert not config_problems(config)

    def test_aliases_lead_to_the_backend(self) -> None:
        """No other backend has such a name."""
        for name in get_backend(self.backend).installed.aliases:
            assert get_backend(name).name == self.backend

    def test_the_hooks_leave_the_process_as_it_is(self) -> None:
        """None of them changes a setting that all share."""
        with process_left_alone():
            get_backend(self.backend).check()

    def test_the_default_mapping_builds(self) -> None:
        """Every observer of the default mapping can be built."""
        assert get_default_qconfig_mapping(self.backend).traits()
