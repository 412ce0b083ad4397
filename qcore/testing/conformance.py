"""The conformance suite: a pytest class that holds a backend to the reference model and to what it claims."""

import copy
import io
import operator
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from qcore.dtypes import QScheme
from qcore.fx.graph_module import QGraphModule, get_attribute
from qcore.fx.match import PatternTable
from qcore.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from qcore.plugins.manager import get_backend
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import QConfigMapping
from qcore.quantize_fx import convert_fx, convert_to_reference_fx, explain, get_default_qconfig_mapping, prepare_fx
from qcore.replay.executor import as_written
from qcore.testing.cases import CASES, EXTREME_CASES, Case

_PER_TENSOR = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)


class _Unknown(PerChannelMinMaxObserver):
    """A weight observer that no backend knows, so that none can put its own in its place."""


_WEIGHT_OBSERVERS = {
    "per channel": PerChannelMinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric),
    "per tensor": _PER_TENSOR,
    "unknown": _Unknown.with_args(dtype=torch.int8, qscheme=QScheme.per_channel_symmetric),
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
        reference: the reference model; if its output isn't a dequantized value, a step is a thousandth of the range.
        expected: its output.
        found: the output to compare.
    """
    expected, found = expected.detach(), found.detach()
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, the reference gives {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0, 1.0
    preparation, number = reference.preparation, _result_tensor(reference)
    assert preparation is not None
    name = preparation.plan.observers.get(number, "")
    step = float(get_attribute(reference, f"{name}_scale")) if name else float(expected.abs().max()) / 1000 or 1.0
    return float((expected - found).abs().max()) / step, step


def _result_tensor(reference: QGraphModule) -> int:
    """The number of the qparams of the model's output; -1 if the output comes from a float operator."""
    preparation = reference.preparation
    assert preparation is not None
    (result,) = next(node for node in reversed(reference.graph.nodes) if node.op == "output").args
    numbers = {f"{name}_scale": number for number, name in preparation.plan.observers.items()}
    sources = [str(getattr(node, "target", "")) for node in getattr(result, "args", ())[1:2]]
    return numbers.get(sources[0], -1) if sources else -1


def _handed_on(reference: QGraphModule) -> float:
    """What a difference of one step in every intermediate result may come to, as a real number."""
    preparation = reference.preparation
    assert preparation is not None
    plan = preparation.plan
    inputs = {node.name for node in reference.graph.nodes if node.op == "placeholder"}
    between = {place.tensor for place in plan.observations if place.value not in inputs} - {_result_tensor(reference)}
    return sum(float(get_attribute(reference, f"{plan.observers[number]}_scale")) for number in between)


class BackendConformance:
    """Subclass it in a test module and name the backend; ``pytest`` does the rest.

    Attributes:
        backend: the backend's name.
        tolerance: how many steps a kernel may differ from the reference model; chains of two roundings get one more.
        replays: whether all kernels are ``replayable``, so that recordings can stand for calls.
    """

    backend: ClassVar[str]
    replays: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1.01

    @pytest.fixture(autouse=True)
    def _available(self) -> None:
        torch.manual_seed(0)
        availability = get_backend(self.backend).availability
        if not availability.ok:
            pytest.skip(availability.reason)

    def make(self, case: Case, mapping: QConfigMapping | None = None) -> tuple[QGraphModule, nn.Module]:
        """The reference model and the converted one of a case."""
        model = case.build().eval()
        mapping = ask_by_name(get_default_qconfig_mapping(self.backend) if mapping is None else mapping)
        inputs = case.inputs(2)
        prepared = prepare_fx(model, mapping, inputs, backend=self.backend, on_unsupported="ignore")
        with torch.no_grad():
            for batch in (inputs, case.inputs(4)):
                prepared(*batch)
        reference = convert_to_reference_fx(prepared)
        assert isinstance(reference, QGraphModule)
        return reference, convert_fx(prepared)

    def check(self, case: Case, reference: QGraphModule, converted: nn.Module, batch: int) -> None:
        """Compare both on new inputs."""
        inputs = case.inputs(batch)
        with torch.no_grad():
            expected, found = reference(*inputs), converted(*inputs)
        apart, step = steps_apart(reference, expected, found)
        assert apart <= self.tolerance + 1.5 * _handed_on(reference) / step

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_a_kernel_computes_what_the_reference_does(self, case: Case) -> None:
        """For every operator and form, and for batches of other sizes than those calibrated on."""
        reference, converted = self.make(case)
        for batch in (2, 1, 3):
            self.check(case, reference, converted, batch)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_replayed_calls_compute_the_same_bits(self, case: Case) -> None:
        """From the third call of a form on, a recording is replayed, on whatever data."""
        _, converted = self.make(case)
        assert isinstance(converted, QGraphModule)
        for _ in range(4):
            inputs = case.inputs(2)
            with torch.no_grad():
                found = converted(*inputs)
                with as_written():
                    assert torch.equal(converted(*inputs), found)
        assert converted.replayed_forms == int(self.replays)

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
        mapping = QConfigMapping().set_global(QConfig(HistogramObserver, _WEIGHT_OBSERVERS[weight]))
        reference, converted = self.make(case, mapping)
        self.check(case, reference, converted, 3)

    @pytest.mark.parametrize("case", EXTREME_CASES, ids=lambda case: case.name)
    def test_the_default_mapping_gives_kernels_at_the_ends_of_the_ranges(self, case: Case) -> None:
        """What the backend's own observers find, its kernels take."""
        _, converted = self.make(case)
        left = [d for d in explain(converted).quantized if "no kernel" in d.reason]
        assert not left

    @pytest.mark.parametrize("name", ["conv2d + add", "cat with a convolution", "linear 3d without bias", "mul"])
    def test_copies_and_saved_models_compute_the_same_bits(self, name: str) -> None:
        """Through deepcopy, pickle, and a state_dict loaded into another model's converted twin."""
        case = next(case for case in CASES if case.name == name)
        _, converted = self.make(case)
        inputs = case.inputs(2)
        with torch.no_grad():
            expected = converted(*inputs)
            assert torch.equal(copy.deepcopy(converted)(*inputs), expected)
            assert torch.equal(pickle.loads(pickle.dumps(converted))(*inputs), expected)
            torch.manual_seed(1)
            _, twin = self.make(case)
            file = io.BytesIO()
            torch.save(converted.state_dict(), file)
            file.seek(0)
            twin.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(twin(*inputs), expected)

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
        PatternTable(config)

    def test_the_default_mapping_builds(self) -> None:
        """Every observer of the default mapping can be built."""
        assert get_default_qconfig_mapping(self.backend).traits()
