"""The structure of a call: tensors are inputs, all else is compared, and what was given is passed on as given."""

import enum
import functools
import inspect
import math
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qcore
from qcore import errors
from qcore.fx.graph_module import QGraphModule
from qcore.fx.signature import CallSignature, NotConstantError, Structure, check_size, same
from tests.models import Attention, Output, TakesConstant, TwoForms, close, prepared_for


@torch.no_grad()
def test_keyword_inputs_positional_inputs_and_both():
    torch.manual_seed(0)
    model = Attention()
    x, mask = torch.randn(2, 5, 16), torch.randn(5, 5)
    for example_inputs in ({"x": x, "mask": mask}, (x, mask), ((x,), {"mask": mask})):
        prepared = prepared_for(model, example_inputs)
        assert torch.allclose(prepared(x, mask=mask), model(x, mask), atol=1e-5)
        qcore.calibrate(prepared, [{"mask": mask, "x": x}])
        close(qcore.convert_fx(prepared)(x, mask), model(x, mask))


def test_a_call_in_another_form_is_an_error_that_says_which_argument():
    x, mask = torch.randn(2, 5, 16), torch.zeros(5, 5)
    prepared = prepared_for(Attention(), (x,))
    with pytest.raises(errors.GuardError, match="Attention .* argument mask was None at preparation and is a tensor"):
        prepared(x, mask)
    with pytest.raises(errors.GuardError, match="argument flag was True at preparation and is False now"):
        prepared(x, flag=False)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Attention()(x, other=1)


@pytest.mark.parametrize(
    "constant, others",
    [(0.0, (-0.0, 0, False)), (1, (True, 1.0)), (True, (1, 1.0)), (math.nan, (-math.nan, 0.0)), (-0.0, (0.0,))],
)
def test_constants_of_a_call_are_compared_bit_for_bit(constant, others):
    model, x = TakesConstant(), torch.randn(2, 4)
    prepared = prepared_for(model, (x, constant))
    for again in (constant, float.fromhex(constant.hex()) if isinstance(constant, float) else constant):
        assert torch.equal(prepared(x, again), model(x, again))
    for other in others:
        with pytest.raises(errors.GuardError, match="argument constant was"):
            prepared(x, other)


@torch.no_grad()
def test_a_dataclass_comes_out_as_it_is():
    torch.manual_seed(0)
    model, x = TwoForms(), torch.randn(3, 4)
    prepared = prepared_for(model, (x,))
    assert isinstance(prepared, QGraphModule)
    prepared(x)
    result = qcore.convert_fx(prepared)(x)
    assert isinstance(result, Output) and result.states[1] is None
    close(result.logits, model(x).logits)


def merges(forward):
    """As libraries do: what isn't given is filled in, what is given by position can't be filled in again."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **{"doubled": self.doubled, **kwargs})

    return wrapper


class Merges(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.doubled, self.inner = nn.Linear(4, 4), True, inner

    @merges
    def forward(self, x, mask=None, doubled=None, **options):
        y = self.linear(x) if mask is None else self.linear(x) + mask
        y = y if self.inner is None else self.inner(y)
        return y * 2 if doubled else y


@torch.no_grad()
@pytest.mark.parametrize(
    "inputs", [lambda x: (x,), lambda x: {"x": x}, lambda x: ((x,), {"mask": x}), lambda x: ((x,), {"doubled": False})]
)
def test_only_what_was_given_is_passed_on_and_as_it_was(inputs):
    torch.manual_seed(0)
    x, model = torch.randn(2, 4), Merges(Merges()).eval()
    args, kwargs = qcore.quantize_fx._call(inputs(x))
    prepared = pickle.loads(pickle.dumps(prepared_for(model, inputs(x))))
    assert isinstance(prepared, QGraphModule) and len([d for d in qcore.explain(prepared).quantized if d.weights]) == 2
    assert torch.allclose(prepared(*args, **kwargs), model(*args, **kwargs), atol=1e-6)
    with pytest.raises(errors.GuardError, match="Merges was prepared for one form of call"):
        prepared(x, doubled=True)  # To the function around the forward that is no default.


ONES = torch.ones(1)


class Defaults(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x, mask=None, *, flag=True, activation=torch.relu, shift=ONES):
        return activation(self.linear(x)) + shift if flag else self.linear(x)


def test_a_default_that_is_given_is_the_same_call():
    x, model = torch.randn(2, 4), Defaults()
    prepared = prepared_for(model, (x,))
    assert isinstance(prepared, QGraphModule)
    for kwargs in ({}, {"mask": None}, {"flag": True}, {"mask": None, "flag": True}):
        assert torch.allclose(prepared(x, **kwargs), model(x), atol=1e-6)
    for kwargs in ({"flag": False}, {"mask": x}, {"shift": torch.zeros(1)}):
        with pytest.raises(errors.GuardError):
            prepared(x, **kwargs)
    assert torch.allclose(prepared_for(model, (x, None))(x), model(x), atol=1e-6)


class Colour(enum.Enum):
    RED = 1


NAN = float("nan")
CONSTANTS = [
    None, True, False, 0, 1, 0.0, -0.0, 1.0, NAN, 1j, complex(0.0, -0.0), 0j, "1", b"1", Colour.RED, ..., slice(0, 1),
    slice(0, 1.0), slice(0, True), torch.float32, torch.float64, torch.Size([1]), (1,), (1.0,), (True,), (1, (0.0,)),
    (1, (-0.0,)), [1], torch.device("cpu"),
]  # fmt: skip


def test_constants_are_the_same_only_if_every_operator_takes_them_so():
    again = [
        pickle.loads(pickle.dumps(c)) if not isinstance(c, slice) else slice(c.start, c.stop, c.step) for c in CONSTANTS
    ]
    for i, constant in enumerate(CONSTANTS):
        assert [j for j, other in enumerate(again) if same(constant, other)] == [i], constant


class Takes(nn.Module):
    def forward(self, x, *more, scale=1.0, mask=None, **others):
        return x


class Plain(nn.Module):
    def forward(self, x, y):
        return x


Pair = namedtuple("Pair", "a b")
T = torch.zeros(1)
values = st.recursive(
    st.sampled_from([T, None, 1, -0.0, "text", True]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
    ),
    max_leaves=6,
)


def shown(value):
    """What a value is made of, with the identity of its tensors."""
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    return [id(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), repr(leaf)) for leaf in leaves], spec


@given(st.lists(values, min_size=1, max_size=4), st.dictionaries(st.sampled_from(["scale", "mask", "a", "b"]), values))
def test_a_call_is_passed_on_as_it_was_given(args, kwargs):
    signature = CallSignature.of(Takes(), args, kwargs, "Takes")
    tensors = signature.bind(args, kwargs)
    assert len(tensors) == len(signature.tensor_names) == len(set(signature.tensor_names))
    given_args, given_kwargs = signature.arguments(tensors)
    assert shown(given_args) == shown(args) and given_kwargs.keys() == kwargs.keys()
    assert all(shown(given_kwargs[name]) == shown(kwargs[name]) for name in kwargs)
    assert signature.bind(given_args, given_kwargs) == tensors
    assert pickle.loads(pickle.dumps(signature)) == signature


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((T,), {"scale": 2.0}, "argument scale was 1.0 at preparation and is 2.0 now"),
        ((T,), {"mask": T}, "argument mask was None at preparation and is a tensor now"),
        ((1,), {}, "argument x was a tensor at preparation and is 1 now"),
        ((T, T), {}, r"its arguments was \(x, .*\) at preparation and is \(x, more\[0\]"),
        ((T,), {"late": None}, "its arguments"),
        (([T],), {}, "its arguments"),
    ],
)
def test_another_call_is_told_by_what_differs(args, kwargs, message):
    signature = CallSignature.of(Takes(), (T,), {}, "the owner")
    assert signature.bind((T,), {"scale": 1.0, "mask": None}) == [T]  # Defaults, given.
    with pytest.raises(errors.GuardError, match=message) as caught:
        signature.bind(args, kwargs)
    assert str(caught.value).startswith("the owner was prepared for one form of call")


def test_keyword_arguments_come_in_any_order():
    signature = CallSignature.of(Takes(), (T,), {"a": 1, "b": torch.ones(1)}, "")
    assert len(signature.bind((T,), {"b": T, "a": 1})) == 2
    with pytest.raises(errors.GuardError):
        signature.bind((T,), {"b": 1, "a": T})


def test_what_is_neither_a_tensor_nor_a_constant_is_named():
    for cache in (object(), {1, 2}, [lambda: None]):
        with pytest.raises(NotConstantError, match=r"its argument more\[0\]"):
            CallSignature.of(Takes(), (T, cache), {}, "")
    # A container that may change by itself isn't opened.
    with pytest.raises(NotConstantError, match="argument x is a Grows"):
        CallSignature.of(Takes(), (Grows([T]),), {}, "")


class Grows(list):
    pass


def test_only_tensors_by_position_are_plain():
    assert CallSignature.of(Plain(), (T, T), {}, "").is_plain
    assert CallSignature.of(Plain(), (T,), {"y": T}, "").is_plain
    assert not CallSignature.of(Plain(), (T, None), {}, "").is_plain
    assert not CallSignature.of(Plain(), (T, [T]), {}, "").is_plain
    assert not CallSignature.of(Takes(), (T,), {}, "").is_plain


@pytest.mark.parametrize(
    ("result", "is_plain"),
    [(T, True), ((T, [T]), True), ({"a": T}, True), ((T, None), False), (OrderedDict(a=T), False), (Pair(T, T), False)],
)
def test_a_result_is_filled_as_it_was_built(result, is_plain):
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    signature = CallSignature.of(Plain(), (result, 1), {}, "")
    structure = Structure(spec, signature.structure.leaves[: len(leaves)])
    assert structure.is_plain is is_plain
    other = torch.ones(1)
    filled = structure.filled([other] * sum(leaf.is_tensor for leaf in structure.leaves))
    assert type(filled) is type(result) and shown(filled)[1] == spec
    again = pickle.loads(pickle.dumps(structure))
    assert again == structure and type(again.filled([other] * 2)) is type(result)


def test_a_size_is_compared_with_its_type():
    check_size(2, 2, "x.size(0)")
    for value in (3, 2.0, True):
        with pytest.raises(errors.GuardError, match=r"traced for x.size\(0\) = 2, and now it is"):
            check_size(value, 2, "x.size(0)")
    with pytest.raises(errors.GuardError):
        check_size(-0.0, 0.0, "")


def test_a_default_that_no_constant_is_stays_the_forward_s():
    class Defaults(nn.Module):
        def forward(self, x, cache=object(), scale=2.0):  # noqa: B008
            return x

    signature = CallSignature.of(Defaults(), (T,), {}, "")
    assert signature.given == ("x",) and signature.arguments([T]) == ([T], {})
    assert [leaf.name for leaf in signature.structure.leaves] == ["x", "scale"]
    assert signature.parameters.parameters["x"].annotation is inspect.Parameter.empty
