"""Lowering by rules, with the fake backend: which rule gets which decision, and what it is told."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcore
from qcore import DTypeConfig, default_dynamic_qconfig, default_weight_only_qconfig, ops
from qcore.backend_config import BackendPatternConfig, ObservationType
from qcore.fx import operators as op
from qcore.lowering import Declined, LoweringRule
from qcore.testing import FakeBackend
from qcore.testing.fake_backend import Dequantize, Kernel, Quantize
from tests.lowering.fake import Calling, Recording, claiming, default_qconfig, kernels, lowered, same, targets

FLOAT = "no kernel: float between dequantize and quantize"
AS_THEY_ARE = "integers as they are"
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(4, 8, generator=RANDOM)
IMAGE = torch.randn(2, 4, 6, 6, generator=RANDOM)


def two_layers(function):
    """A function between two linear layers, of 8 numbers each."""
    return Calling(lambda m, x: m.last(function(m.first(x))), first=nn.Linear(8, 8), last=nn.Linear(8, 3))


def two_convolutions(function):
    return Calling(lambda m, x: m.last(function(m.first(x))), first=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 4, 1))


def crossings(model):
    """How often a graph goes from floats to integers, and back."""
    called = [model.get_submodule(target) for target in targets(model, "call_module")]
    return sum(isinstance(m, Quantize) for m in called), sum(isinstance(m, Dequantize) for m in called)


def layers_as(backend, **rules):
    """Three linear layers, some of them with a qconfig of their own."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    return lowered(backend, model, X, rules={name.removeprefix("at"): q for name, q in rules.items()})


class TestChains:
    """A decision goes to the rules of exactly its operators."""

    CHAINS = ((op.CONV[1], op.ADD), (op.LINEAR, op.GELU))

    def residual(self):
        def forward(m, x):
            y = m.first(x)
            return m.second(y) + y

        return Calling(forward, first=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 4, 3, padding=1))

    def test_of_a_chain(self):
        backend = claiming(*self.CHAINS)
        models = lowered(backend, self.residual(), IMAGE)
        assert kernels(models[1]) == {"conv2d": "fake conv2d", "conv2d + add": "fake conv2d + add"}
        assert same(*models, IMAGE) and crossings(models[1]) == (1, 1)
        call = backend.named("second")
        assert [op.operator_of(node).name for node in call.nodes] == ["conv2d", "add"]
        # The convolution's input and the residual are one value, read twice.
        assert [source.name for source in call.sources] == ["dequantize_per_tensor_default_1"] * 2
        assert call.inputs[0] == call.inputs[1] and len(call.weights) == len(call.biases) == 1
        assert call.overwritable == (False, False)

    def test_of_a_chain_with_no_clamp(self):
        models = lowered(claiming(*self.CHAINS), nn.Sequential(nn.Linear(8, 6), nn.GELU()), X)
        assert kernels(models[1]) == {"linear + gelu": "fake linear + gelu"} and same(*models, X)

    def test_no_rule_for_the_chain_is_none_though_there_is_one_for_its_first_operator(self):
        backend = claiming(*self.CHAINS).without(*self.CHAINS)
        for model, x, chain in (
            (self.residual(), IMAGE, "conv2d + add"),
            (nn.Sequential(nn.Linear(8, 6), nn.GELU()), X, "linear + gelu"),
        ):
            models = lowered(backend, model, x)
            assert kernels(models[1])[chain] == FLOAT and same(*models, x)
            (decision,) = [d for d in qcore.explain(models[1]).quantized if len(d.operators) == 2]
            assert decision.quantized and decision.kernel == "" and FLOAT in str(qcore.explain(models[1]))
        assert len(backend.calls) == 1 and backend.calls[0].nodes[0].name == "first"

    def test_a_rule_for_a_chain_takes_nothing_that_the_plan_has_apart(self):
        class Mistaken(Recording):
            def rules(self):
                return [LoweringRule((op.LINEAR, op.GELU), self.kernel), *super().rules()]

        backend = Mistaken()
        models = lowered(backend, nn.Sequential(nn.Linear(8, 6), nn.GELU()), X)
        assert kernels(models[1]) == {"linear": "fake linear", "gelu": "fake gelu"} and same(*models, X)

    def test_a_chain_of_what_only_moves_elements_is_not_half_done(self):
        class Together(Recording):
            def config(self):
                chain = BackendPatternConfig((op.TRANSPOSE, op.RESHAPE), dtype_configs=[DTypeConfig(torch.uint8)])
                chain.set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT)
                return super().config().set_backend_pattern_config(chain)

        model = two_layers(lambda y: y.transpose(0, 1).reshape(-1, 8))
        models = lowered(Together(), model, X)
        assert kernels(models[1])["transpose + reshape"] == FLOAT and same(*models, X)


class TestRules:
    def rules(self, *builds):
        class Choosing(FakeBackend):
            def rules(self):
                mine = [LoweringRule(op.LINEAR, build) for build in builds]
                return [*mine, *(rule for rule in super().rules() if rule.pattern is not op.LINEAR)]

        return lowered(Choosing(), nn.Sequential(nn.Linear(8, 6)), X)

    @staticmethod
    def called(name):
        def build(call):
            kernel = Kernel(call)
            kernel.kernel_name = name
            return kernel

        return build

    @staticmethod
    def declined(reason):
        return lambda call: Declined(reason)

    def test_the_first_that_does_not_decline_is_taken(self):
        _, model = self.rules(self.called("one"), self.called("other"))
        assert kernels(model) == {"linear": "one"}
        _, model = self.rules(self.declined("too small"), self.called("other"), self.called("third"))
        assert kernels(model) == {"linear": "other"}

    def test_the_first_reason_is_told_if_all_decline(self):
        models = self.rules(self.declined("too small"), self.declined("too large"))
        reason = "no kernel (too small): float between dequantize and quantize"
        assert kernels(models[1]) == {"linear": reason} and same(*models, X)
        assert reason in qcore.explain(models[1]).as_text(200)
        _, model = self.rules(self.declined(""), self.declined("too large"))
        assert kernels(model) == {"linear": reason.replace("small", "large")}

    def test_a_kernel_without_a_name_goes_by_its_class(self):
        class Nameless(Kernel):
            def __init__(self, call):
                super().__init__(call)
                del self.kernel_name

        _, model = self.rules(Nameless)
        assert kernels(model) == {"linear": "Nameless"}

    def test_a_rule_may_name_any_form_of_an_operator(self):
        class Forms(Recording):
            def rules(self):
                return [LoweringRule(nn.Linear, self.kernel), LoweringRule((nn.Conv2d, torch.add), self.kernel)]

        backend = Forms()
        _, model = lowered(backend, nn.Sequential(nn.Linear(8, 6)), X)
        assert kernels(model) == {"linear": "fake linear"}


class TestClamps:
    def call(self, *activations, backend=None):
        backend = backend or Recording()
        models = lowered(backend, nn.Sequential(nn.Linear(8, 6), *activations), X)
        return models, backend.named("_0")

    def test_an_absorbed_clamp_is_the_bounds_of_the_output(self):
        models, call = self.call(nn.ReLU6())
        assert kernels(models[1]) == {"linear + relu6": "fake linear"}
        assert [node.name for node in call.nodes] == ["_0"] and call.output.clamp == (0.0, 6.0)
        assert call.output.bounds in (None, (call.output.zero_point, call.output.quantize(6.0)))
        assert torch.clamp not in targets(models[1]) and torch.clamp in targets(models[0])
        assert same(*models, X) and same(*models, 10 * X) and bool((models[1](10 * X) >= 0).all())

    def test_several_are_one(self):
        models, call = self.call(nn.Hardtanh(-0.5, 4.0), nn.ReLU(), nn.Hardtanh(-7.0, 0.25))
        assert kernels(models[1]) == {"linear + hardtanh + relu + hardtanh": "fake linear"}
        assert call.output.clamp == (0.0, 0.25) and same(*models, X) and same(*models, 10 * X)

    def test_bounds_that_lie_within_the_range(self):
        def joined(m, x):
            y = m.first(x)
            return torch.cat([F.hardtanh(y, -0.2, 0.3), m.second(y)], 1)

        backend = Recording()
        model = Calling(joined, first=nn.Linear(8, 8), second=nn.Linear(8, 8))
        models = lowered(backend, model, X)
        call = backend.named("hardtanh")
        assert call.nodes[0].target is torch.clamp and call.keeps_qparams and call.weights == ()
        assert same(*models, X)

    def test_a_clamp_that_a_rule_keeps_float_stays(self):
        backend = Recording()
        models = lowered(backend, nn.Sequential(nn.Linear(8, 6), nn.ReLU6()), X, rules={"1": None})
        assert kernels(models[1]) == {"linear": "fake linear"} and torch.clamp in targets(models[1])
        assert backend.named("_0").output.clamp == (-torch.inf, torch.inf) and same(*models, X)

    def test_no_kernel_no_absorbed_clamp_is_lost(self):
        backend = Recording().without(op.LINEAR)
        models = lowered(backend, nn.Sequential(nn.Linear(8, 6), nn.ReLU6()), X)
        assert kernels(models[1]) == {"linear + relu6": FLOAT}
        assert same(*models, X) and same(*models, 10 * X) and bool((models[1](10 * X) >= 0).all())


MOVES = {
    "flatten": lambda y: y.unflatten(1, (2, 4)).flatten(1),
    "reshape": lambda y: y.reshape(2, -1).reshape(-1, 8),
    "permute": lambda y: y.reshape(2, 2, 8).permute(1, 0, 2),
    "transpose": lambda y: y.transpose(0, 1)[:, :4].reshape(4, 8),
    "squeeze": lambda y: y.unsqueeze(1).squeeze(1),
    "chunk": lambda y: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1),
    "split": lambda y: torch.cat([y.split([3, 5], 1)[1], y[:, :3]], 1),
    "getitem": lambda y: y[:, [7, 6, 5, 4, 3, 2, 1, 0]],
    "narrow": lambda y: torch.cat([y.narrow(1, 4, 4), y.narrow(1, 0, 4)], 1),
    "cat": lambda y: torch.cat([y, y], 0),
    "stack": lambda y: torch.stack([y, y], 0),
}


class TestMoves:
    """What only moves elements works on integers without a rule."""

    @pytest.mark.parametrize("name", MOVES)
    def test_on_integers_as_they_are(self, name):
        models = lowered(Recording(), two_layers(MOVES[name]), X)
        found = kernels(models[1])
        assert found.pop("linear") == "fake linear"
        assert name in found and set(found.values()) == {AS_THEY_ARE}
        assert crossings(models[1]) == (1, 1) and same(*models, X)

    @pytest.mark.parametrize("function", [lambda y: F.pixel_shuffle(y, 2).repeat(1, 4, 1, 1), op.CHANNEL_SHUFFLE])
    def test_images(self, function):
        if function is op.CHANNEL_SHUFFLE:
            models = lowered(Recording(), two_convolutions(lambda y: torch.channel_shuffle(y, 2)), IMAGE)
            assert kernels(models[1])["channel_shuffle"] == AS_THEY_ARE and crossings(models[1]) == (1, 1)
        else:
            models = lowered(Recording(), two_convolutions(function), IMAGE)
            assert kernels(models[1])["pixel_shuffle"] == AS_THEY_ARE
        assert same(*models, IMAGE)

    def test_a_result_of_moves_alone_is_left_once(self):
        models = lowered(
            Recording(), Calling(lambda m, x: m.first(x).chunk(2, 1)[1].flatten(), first=nn.Linear(8, 8)), X
        )
        assert set(kernels(models[1]).values()) == {"fake linear", AS_THEY_ARE}
        assert crossings(models[1]) == (1, 1) and same(*models, X)

    def test_parts_that_are_taken_out_as_floats_are_not_said_to_be_integers(self):
        models = lowered(Recording(), two_layers(lambda y: torch.cat(y.chunk(2, 1)[::-1], 1)), X)
        assert kernels(models[1]) == {"linear": "fake linear", "chunk": FLOAT} and same(*models, X)

    def test_cat_of_other_qparams_is_a_kernels_or_float(self):
        def joined(m, x):
            return torch.cat([m.first(x), m.second(x)], 1)

        model = Calling(joined, first=nn.Linear(8, 8), second=nn.Linear(8, 8))
        plain = qcore.QConfig(qcore.MinMaxObserver, default_qconfig().weight)
        models = lowered(Recording(), model, X, rules={"second": plain})
        assert kernels(models[1]) == {"linear": "fake linear", "cat": FLOAT} and same(*models, X)
        models = lowered(claiming(op.CAT), model, X, rules={"second": plain})
        assert kernels(models[1]) == {"linear": "fake linear", "cat": "fake cat"} and same(*models, X)
        assert crossings(models[1]) == (2, 1)  # Two observers look at the input.

    def test_constant_padding_needs_a_rule(self):
        for backend, expected, counts in (
            (Recording(), "fake pad", (1, 1)),
            (Recording().without(op.PAD), FLOAT, (2, 2)),
        ):
            models = lowered(backend, two_convolutions(lambda y: F.pad(y, (1, 0, 2, 1))), IMAGE)
            assert kernels(models[1])["pad"] == expected and crossings(models[1]) == counts and same(*models, IMAGE)

    @pytest.mark.parametrize("mode", ["reflect", "replicate"])
    def test_other_padding_moves(self, mode):
        models = lowered(
            Recording().without(op.PAD),
            two_convolutions(lambda y: F.pad(y, (1, 1, 1, 1), mode=mode)),
            IMAGE,
        )
        assert same(*models, IMAGE)
        assert kernels(models[1])["pad"] == AS_THEY_ARE and crossings(models[1]) == (1, 1)


class TestSizes:
    def test_sizes_are_read_off_the_integers(self):
        model = two_layers(lambda y: y.reshape(y.shape[1], -1).reshape(-1, y.size(1)) if y.dim() == 2 else y)
        models = lowered(Recording(), model, X)
        assert crossings(models[1]) == (1, 1)
        assert same(*models, X) and same(*models, torch.randn(16, 8))

    def test_a_rule_that_takes_no_computed_arguments_declines_them(self):
        def padded(y):
            return F.pad(y, (0, y.shape[2] - 4, 0, 0))

        class Fixed(Recording):
            def rules(self):
                return [LoweringRule(rule.pattern, rule.build, rule.is_dynamic) for rule in super().rules()]

        backend = Recording()
        models = lowered(backend, two_convolutions(padded), IMAGE)
        assert kernels(models[1])["pad"] == "fake pad" and same(*models, IMAGE)
        assert same(*models, torch.randn(1, 4, 8, 5))
        (call,) = [call for call in backend.calls if call.computed]
        assert len(call.computed) == 1 and len(call.inputs) == 1 and crossings(models[1]) == (1, 1)
        backend = Fixed()
        models = lowered(backend, two_convolutions(padded), IMAGE)
        why = "no kernel (an argument is computed in the graph): float between dequantize and quantize"
        assert kernels(models[1])["pad"] == why and same(*models, torch.randn(1, 4, 8, 5))
        assert [call.nodes[0].name for call in backend.calls] == ["first", "last"]  # It isn't even asked.


class TestWhatACallTells:
    def test_integers_may_be_written_over_when_nobody_reads_them_later(self):
        def forward(m, x):
            a = m.a(x)  # The model's own integers: nobody reads them after.
            b, c = m.b(a), m.c(a)  # ``a`` is read by both, at last by the second.
            d = m.d(b.flatten(1))  # A view.
            return (c + c) + d

        backend = Recording()
        layers = {name: nn.Linear(8, 8) for name in "abcd"}
        models = lowered(backend, Calling(forward, **layers), X)
        found = {call.nodes[0].name: call.overwritable for call in backend.calls}
        assert found == {
            "a": (True,), "b": (False,), "c": (True,), "d": (False,), "add": (False, False), "add_1": (True, True),
        }  # fmt: skip
        assert same(*models, X)

    def test_results_of_the_same_qparams(self):
        backend = Recording()
        lowered(backend, two_convolutions(lambda y: F.max_pool2d(y, 2)), IMAGE)
        found = {op.operator_of(call.nodes[0]).name: call.keeps_qparams for call in backend.calls}
        assert found == {"conv2d": False, "max_pool2d": True}

    def test_weights_and_arguments(self):
        backend = Recording()
        model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False))
        reference, _ = lowered(backend, model, IMAGE)
        (call,) = backend.calls
        state = reference.state_dict()
        assert call.args[3:] == ((2, 2), (1, 1), (1, 1), 1) and call.bias is None and call.computed == ()
        assert torch.equal(call.weight.values, state["0.weight"]) and call.weight.axis == 0
        assert torch.equal(call.weight.scale, state["0.weight_qparams.scale"])
        assert call.inputs[0].scale == float(state["activation_post_process_0.scale"])
        assert call.quantized_output.zero_point == int(state["activation_post_process_1.zero_point"])
        assert call.module is None and call.dynamic is None and not call.keeps_qparams


class Dynamic(Recording):
    """All with weights at run time, and a chain of such."""

    patterns = (*Recording.patterns, (op.LINEAR, op.ADD))

    def dtypes(self, first):
        weighted = super().dtypes(op.LINEAR)
        return weighted if getattr(first, "weights", ()) else super().dtypes(first)

    def rules(self):
        more = (*op.RNN_CELLS, (op.LINEAR, op.ADD), (op.LINEAR, op.CLAMP))
        return [*super().rules(), *(LoweringRule(pattern, self.kernel, is_dynamic=True) for pattern in more)]


class TestDynamic:
    """Ranges that are taken at run time."""

    def test_a_kernel_from_float_to_float(self):
        backend = Recording()
        models = lowered(backend, nn.Sequential(nn.Linear(8, 6)), X, rules={"0": default_dynamic_qconfig})
        (call,) = backend.calls
        assert call.dynamic == (0, 255) and call.inputs == () and call.output is None
        assert kernels(models[1]) == {"linear": "fake linear"} and crossings(models[1]) == (0, 0)
        for size in (1.0, 1e3, 1e-3):
            assert same(*models, X * size)
        assert same(*models, X.half()) and same(*models, X.bfloat16())

    def test_a_clamp_behind_it_stays(self):
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Hardtanh(0.1, 0.2))
        rules = dict.fromkeys("012", default_dynamic_qconfig)
        models = lowered(Recording(), model, X, rules=rules)
        assert kernels(models[1]) == {"linear": "fake linear"}
        reason = "its input is float, and it only hands on what it gets"
        assert [(d.operators, d.reason) for d in qcore.explain(models[1]).floating] == [
            (("relu",), reason), (("hardtanh",), reason),
        ]  # fmt: skip
        assert targets(models[1]).count(torch.clamp) == 2 and same(*models, X)

    def test_a_clamp_that_a_pattern_names_goes_with_it(self):
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Hardtanh(0.1, 0.2))
        backend = claiming((op.LINEAR, op.CLAMP), base=Dynamic)
        models = lowered(backend, model, X, rules=dict.fromkeys("012", default_dynamic_qconfig))
        assert kernels(models[1]) == {"linear + relu": "fake linear + clamp"}
        assert targets(models[1]).count(torch.clamp) == 1 and same(*models, X)

    def test_between_layers_on_integers(self):
        backend = Recording()
        models = layers_as(backend, at1=default_dynamic_qconfig)
        assert [d.kernel for d in qcore.explain(models[1]).quantized] == ["fake linear"] * 3
        # Whoever quantizes its result later does that himself.
        assert [call.output is None for call in backend.calls] == [False, True, False]
        assert crossings(models[1]) == (2, 2) and same(*models, X) and same(*models, 100 * X)

    def test_its_result_is_float_though_its_dtype_config_does_not_say_so(self):
        class Silent(Recording):
            def dtypes(self, first):
                return [replace(c, output_dtype=None) if c.is_dynamic else c for c in super().dtypes(first)]

        backend = Silent()
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        models = lowered(backend, model, X, rules={"1": default_dynamic_qconfig})
        assert [call.output is None for call in backend.calls] == [False, True, False]
        assert kernels(models[1]) == {"linear": "fake linear"} and same(*models, X) and same(*models, 100 * X)

    def test_without_a_rule_it_is_computed_in_float(self):
        class Static(Recording):
            def rules(self):
                return [rule for rule in super().rules() if not rule.is_dynamic]

        models = layers_as(Static(), at1=default_dynamic_qconfig)
        reason = "no kernel: rounded at run time, computed in float"
        found = [d.kernel or d.reason for d in qcore.explain(models[1]).quantized]
        assert found == ["fake linear", reason, "fake linear"] and same(*models, X)

    def test_a_chain_with_another_operand(self):
        backend = Dynamic()
        model = Calling(lambda m, x, y: m.first(x) + y, first=nn.Linear(8, 6))
        y = torch.randn(4, 6)
        models = lowered(backend, model, X, y, rules={"first": default_dynamic_qconfig})
        assert kernels(models[1]) == {"linear + add": "fake linear + add"}
        assert [source.op for source in backend.calls[0].sources] == ["call_function", "placeholder"]
        assert same(*models, X, y) and same(*models, 10 * X, 100 * y)

    def test_an_operator_of_two_activations_and_two_weights(self):
        backend = Dynamic()
        state = torch.randn(4, 5)
        backend.mapping = lambda version: qcore.QConfigMapping().set_global(default_dynamic_qconfig)
        models = lowered(backend, Cell(), X, state)
        assert kernels(models[1]) == {"gru_cell": "fake gru_cell"}
        assert targets(models[0]).count(ops.dynamic_quantize_dequantize) == 2
        assert same(*models, X, state) and same(*models, 10 * X, 0.1 * state)


class TestFloats:
    def test_weights_alone_are_no_kernels(self):
        backend = Recording()
        models = layers_as(backend, at1=default_weight_only_qconfig)
        found = [(d.kernel, d.reason) for d in qcore.explain(models[1]).quantized]
        # It reads what the layer before it gives as integers, and reads it as float, as the plan has it.
        assert found == [("fake linear", ""), ("", ""), ("fake linear", "")] and same(*models, X)
        assert len(backend.calls) == 2 and crossings(models[1]) == (2, 2)
        assert models[1].state_dict()["1.weight"].dtype == torch.int8

    def test_a_kernel_may_give_float(self):
        class GivesFloat(Recording):
            def dtypes(self, first):
                static = super().dtypes(first)
                if not getattr(first, "weights", ()):
                    return static
                return [DTypeConfig(self.dtype, torch.float32, static[0].weight_dtype), *static]

        backend = GivesFloat()
        model = Calling(lambda m, x: torch.sin(m.last(m.first(x))), first=nn.Linear(8, 8), last=nn.Linear(8, 3))
        models = lowered(backend, model, X, on_unsupported="ignore")
        assert [call.output is None for call in backend.calls] == [False, True]
        assert kernels(models[1]) == {"linear": "fake linear"} and crossings(models[1]) == (1, 0)
        assert same(*models, X)

    def test_nothing_lowered_is_the_reference_on_the_backends_boundaries(self):
        backend = Recording()
        backend.rules = list
        models = lowered(backend, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), X)
        assert kernels(models[1]) == {"linear": FLOAT} and same(*models, X)


class Swish(nn.Module):
    """Somebody's activation, with Python that can't be traced."""

    def __init__(self, beta=1.5):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def forward(self, x):
        if float(x.detach().sum()) == 12345.0:
            raise ValueError("an unlucky number")
        return x * torch.sigmoid(self.beta * x)


class Host(nn.Module):
    """Decides by data, so that it stays Python around its parts."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), Swish(), nn.Linear(8, 8))

    def forward(self, x):
        y = self.part(x)
        return y if x.sum() > 0 else -y


class SwishKernel(nn.Module):
    """Of its own kind, as a vendor's would be."""

    kernel_name = "table of swish"

    def __init__(self, call):
        super().__init__()
        self.leave = FakeBackend().leave(call.inputs[0])
        self.enter = FakeBackend().enter(call.output)
        self.register_buffer("beta", call.module.beta.detach().clone())

    def forward(self, integers):
        x = self.leave(integers)
        return self.enter(x * torch.sigmoid(self.beta * x))


class OfSwish(Recording):
    patterns = (*Recording.patterns, Swish)

    def rules(self):
        return [LoweringRule(Swish, self.swish), *(r for r in super().rules() if r.pattern is not Swish)]

    def swish(self, call):
        self.calls.append(call)
        return SwishKernel(call)


def swish_between():
    return nn.Sequential(nn.Linear(8, 8), Swish(), nn.Linear(8, 3))


class TestCustomModules:
    """A user's class that a BackendConfig names."""

    def test_it_is_kept_whole_quantized_and_lowered_by_its_class(self):
        backend = OfSwish()
        reference, converted = lowered(backend, swish_between(), X)
        assert qcore.explain(converted).python == ()
        assert kernels(converted) == {"linear": "fake linear", "Swish": "table of swish"}
        assert "table of swish" in str(qcore.explain(converted))
        (node,) = [node for node in reference.graph.nodes if node.op == "call_module"]
        assert node.target == "1" and isinstance(reference.get_submodule("1"), Swish)
        assert node.args[0].target is ops.dequantize_per_tensor
        assert [user.target for user in node.users] == [ops.quantize_per_tensor]
        (call,) = [call for call in backend.calls if call.module is not None]
        assert type(call.module) is Swish and call.module.beta.item() == 1.5
        assert same(reference, converted, X) and crossings(converted) == (1, 1)
        assert "_1.beta" in converted.state_dict() and not any(isinstance(m, Swish) for m in converted.modules())

    def test_a_clamp_behind_it_is_absorbed(self):
        backend = OfSwish()
        model = nn.Sequential(nn.Linear(8, 8), Swish(), nn.ReLU(), nn.Linear(8, 3))
        models = lowered(backend, model, X)
        assert kernels(models[1]) == {"linear": "fake linear", "Swish + relu": "table of swish"}
        (call,) = [call for call in backend.calls if call.module is not None]
        assert call.output.clamp == (0.0, torch.inf) and same(*models, X)
        assert torch.clamp not in targets(models[1])

    @pytest.mark.parametrize("chain", [(Swish, op.ADD), (op.LINEAR, Swish)], ids=["first", "last"])
    def test_in_a_chain(self, chain):
        backend = claiming(chain, base=OfSwish)
        model = Calling(lambda m, x: m.last(m.swish(m.first(x)) + x), first=nn.Linear(8, 8), last=nn.Linear(8, 3))
        model.swish = Swish()
        models = lowered(backend, model, X)
        name = " + ".join(getattr(key, "name", "Swish") for key in chain)
        assert kernels(models[1])[name] == f"fake {name}" and same(*models, X)
        (call,) = [call for call in backend.calls if len(call.nodes) == 2]
        assert [type(module) for module in call.modules] == [
            Swish if key is Swish else type(None) for key in chain
        ]  # fmt: skip

    def test_the_general_kernel_takes_it_too(self):
        models = lowered(claiming(Swish), swish_between(), X)
        assert kernels(models[1])["Swish"] == "fake Swish" and same(*models, X)

    def test_in_a_part_of_a_model_that_stays_python(self):
        models = lowered(OfSwish(), Host(), X)
        plan = qcore.explain(models[1])
        assert plan.parts == ("part",) and [module.path for module in plan.python] == [""]
        assert kernels(models[1]) == {"linear": "fake linear", "Swish": "table of swish"}
        for x in (X.abs(), -X.abs()):
            assert same(*models, x)

    def test_copies_and_pickles(self):
        _, converted = lowered(OfSwish(), swish_between(), X)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(other(X), converted(X)) and kernels(other) == kernels(converted)

    def test_without_a_rule_it_is_float_between_integers(self):
        backend = claiming(Swish).without(Swish)
        models = lowered(backend, swish_between(), X)
        assert kernels(models[1])["Swish"] == FLOAT and same(*models, X)
        assert any(isinstance(module, Swish) for module in models[1].modules())

    def test_a_backend_that_does_not_name_it_goes_around_it(self):
        models = lowered(Recording(), swish_between(), X)
        plan = qcore.explain(models[1])
        assert plan.parts == ("0", "2") and [(m.path, m.culprit) for m in plan.python] == [("", "1")]
        assert "Swish" not in kernels(models[1])

    def test_it_may_be_called_by_keyword_and_with_settings(self):
        class Scaled(Swish):
            def forward(self, x, *, times=1.0):
                return super().forward(x) * times

        model = Calling(lambda m, x: m.scaled(x=m.first(x), times=3.0), first=nn.Linear(8, 8), scaled=Scaled())
        models = lowered(claiming(Scaled), model, X)
        assert kernels(models[1]) == {"linear": "fake linear", "Scaled": "fake Scaled"} and same(*models, X)

    def test_a_subclass_is_another_class(self):
        class Faster(Swish):
            pass

        model = nn.Sequential(nn.Linear(8, 8), Faster(), nn.Linear(8, 3))
        models = lowered(OfSwish(), model, X)
        assert "Faster" not in kernels(models[1]) and qcore.explain(models[1]).parts == ("0", "2")


class Cell(nn.Module):
    """A recurrent cell, called by its function."""

    def __init__(self, bias=True, square=False):
        super().__init__()
        self.cell = nn.GRUCell(5 if square else 8, 5, bias=bias)
        if square:
            self.cell.weight_ih = self.cell.weight_hh

    def forward(self, x, state):
        c = self.cell
        return torch.gru_cell(x, state, c.weight_ih, c.weight_hh, c.bias_ih, c.bias_hh)


class TestSeveralWeights:
    """An operator of two weights."""

    STATE = torch.randn(4, 5, generator=RANDOM)

    def test_the_plan_the_reference_model_and_the_kernel_have_both(self):
        backend = Recording()
        model = Cell()
        reference, converted = lowered(backend, model, X, self.STATE)
        plan = qcore.explain(converted)
        (decision,) = plan.quantized
        assert kernels(converted) == {"gru_cell": "fake gru_cell"}
        assert decision.weights == 15 * 8 + 15 * 5 and plan.weight_share == 1.0
        assert [(w.node, w.argument) for w in plan.weights] == [("gru_cell", 2), ("gru_cell", 3)]
        state = reference.state_dict()
        for name, rows in (("cell.weight_ih", 8), ("cell.weight_hh", 5)):
            assert (state[name].dtype, state[name].shape) == (torch.int8, (15, rows))
            assert state[f"{name}_qparams.scale"].shape == (15,)
        (call,) = backend.calls
        assert [tuple(weight.values.shape) for weight in call.weights] == [(15, 8), (15, 5)]
        for weight, name in zip(call.weights, ("cell.weight_ih", "cell.weight_hh"), strict=True):
            assert torch.equal(weight.values, state[name])
        assert torch.equal(call.biases[0], model.cell.bias_ih) and torch.equal(call.biases[1], model.cell.bias_hh)
        assert len(call.inputs) == 2 and same(reference, converted, X, self.STATE)
        error = (converted(X, self.STATE) - model(X, self.STATE)).norm()
        assert error <= 0.03 * model(X, self.STATE).norm()

    def test_one_weight_and_bias_of_several_is_asked_for_by_number(self):
        backend = Recording()
        lowered(backend, Cell(), X, self.STATE)
        for name in ("weight", "bias"):
            with pytest.raises(ValueError, match="too many values"):
                getattr(backend.calls[0], name)

    def test_the_state_is_complete(self):
        converted, twin = (lowered(Recording(), Cell(), X * s, self.STATE)[1] for s in (1, 5))
        assert not torch.equal(converted(X, self.STATE), twin(X, self.STATE))
        names = {f"weights.{n}.{part}" for n in (0, 1) for part in ("values", "scale", "zero_point")}
        assert names | {"bias_0", "bias_1"} <= {n.removeprefix("gru_cell.") for n in converted.state_dict()}
        twin.load_state_dict(converted.state_dict())
        assert torch.equal(converted(X, self.STATE), twin(X, self.STATE))

    def test_without_biases(self):
        backend = Recording()
        models = lowered(backend, Cell(bias=False), X, self.STATE)
        assert backend.calls[0].biases == (None, None) and same(*models, X, self.STATE)

    def test_one_tensor_for_both(self):
        backend = Recording()
        x = torch.randn(4, 5)
        reference, converted = lowered(backend, Cell(square=True), x, self.STATE)
        first, second = backend.calls[0].weights
        assert torch.equal(first.values, second.values) and same(reference, converted, x, self.STATE)
        assert sum(value.dtype == torch.int8 for value in reference.state_dict().values()) == 1

    @pytest.mark.parametrize("backend", ["reference"])
    def test_the_reference_backend_takes_it(self, backend):
        model, mapping = Cell().eval(), qcore.get_default_qconfig_mapping(backend)
        prepared = qcore.prepare_fx(model, mapping, (X, self.STATE), backend=backend)
        prepared(X, self.STATE)
        assert [d.operators for d in qcore.explain(qcore.convert_fx(prepared)).quantized] == [("gru_cell",)]
        mapping = qcore.QConfigMapping().set_global(default_dynamic_qconfig)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = qcore.prepare_fx(model, mapping, (X, self.STATE), backend=backend)
        (decision,) = qcore.explain(prepared).decisions
        assert not decision.quantized and "it offers no dynamic quantization here" in decision.reason
