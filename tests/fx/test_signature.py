"""The structure of a call: tensors are inputs, all else is compared, and what was given is passed on as given."""

import functools
import math
import pickle

import pytest
import torch
from torch import nn

import qcore
from qcore import errors
from qcore.fx.graph_module import QGraphModule
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
