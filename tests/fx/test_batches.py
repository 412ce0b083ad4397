"""How a batch becomes a call: by name or by position, a target left out, and nothing guessed."""

from collections import UserDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcore.errors import ConfigError
from qcore.fx.batches import ANY_CONVENTION, InputConvention

Named = namedtuple("Named", "mask x")
Other = namedtuple("Other", "image label")


def convention(inputs, positions=None, names=None, starts_with_container=False):
    return InputConvention(inputs, starts_with_container, positions, names)


ONE = convention(1, 1, ("x",))
TWO = convention(2, 2, ("x", "mask"))
OPTIONAL = convention(1, 2, ("x", "mask"))
LISTS = convention(1, 1, ("images",), starts_with_container=True)


def test_the_convention_is_read_off_the_forward_and_the_example_call():
    class Model(nn.Module):
        def forward(self, first, /, x, y=None, *, z=None):
            return first

    assert InputConvention.of(Model(), (1, 2), {"z": 3}) == convention(3, 3, ("x", "y", "z"))
    assert InputConvention.of(Model(), ([1],), {}).starts_with_container
    assert not InputConvention.of(Model(), (), {"x": [1]}).starts_with_container

    class Anything(nn.Module):
        def forward(self, *args, **kwargs):
            return args

    assert InputConvention.of(Anything(), (1,), {}) == convention(1, None, None)


@pytest.mark.parametrize(
    ("taken", "batch", "args", "kwargs"),
    [
        (ONE, 7, (7,), {}),
        (ONE, [7], (7,), {}),
        (ONE, (7, "target"), (7,), {}),
        (ONE, {"x": 7}, (), {"x": 7}),
        (ONE, UserDict(x=7), (), {"x": 7}),
        (ONE, ([7], "target"), (7,), {}),
        (ONE, ({"x": 7}, "target"), (), {"x": 7}),
        (TWO, (7, 8), (7, 8), {}),
        (TWO, (7, 8, "target"), (7, 8), {}),
        (TWO, Named(mask=8, x=7), (), {"x": 7, "mask": 8}),
        (ONE, Other(7, "target"), (7,), {}),  # Names that the forward doesn't know go by position.
        (OPTIONAL, (7,), (7,), {}),
        (LISTS, ([7, 8],), ([7, 8],), {}),
        (LISTS, ([7, 8], "target"), ([7, 8],), {}),  # What is itself a container isn't opened.
        (ANY_CONVENTION, (7, 8, 9), (7, 8, 9), {}),
        (ANY_CONVENTION, ([7], 8), ([7], 8), {}),
        (ANY_CONVENTION, {"a": 1}, (), {"a": 1}),
    ],
)
def test_what_a_batch_stands_for(taken, batch, args, kwargs):
    assert taken.call(batch) == (args, kwargs)


@pytest.mark.parametrize(
    ("taken", "batch", "message"),
    [
        (OPTIONAL, (7, 8), r"tuple of 2, .* prepared with 1 arguments and its forward takes 2"),  # A mask or a target?
        (ONE, [7, "target", "weight"], "list of 3"),
        (LISTS, [7, 8], "can't be told"),  # Two images, or one and a target?
        (ONE, {"x": 7, "labels": 1}, r"holds 'labels', .* takes x; .*batch\[name\] for name in \['x'\]"),
        (ONE, {"labels": 1}, r"lambda batch: batch\[\.\.\.\]"),
    ],
)
def test_what_may_be_an_input_or_a_target_is_never_guessed(taken, batch, message):
    with pytest.raises(ConfigError, match=message):
        taken.call(batch)


@given(inputs=st.integers(1, 5), optional=st.integers(0, 3), extra=st.integers(0, 3))
def test_only_a_last_entry_for_which_there_is_no_parameter_is_left_out(inputs, optional, extra):
    taken = convention(inputs, inputs + optional, tuple("abcdefgh"[: inputs + optional]))
    batch = tuple(range(inputs + extra))
    if extra == 0 or (extra == 1 and optional == 0):
        assert taken.call(batch) == (batch[:inputs], {})
    else:
        with pytest.raises(ConfigError):
            taken.call(batch)


def test_a_tensor_is_one_argument_and_not_a_sequence_of_its_rows():
    x = torch.arange(2.0)
    ((found,), kwargs) = TWO.call(x)
    assert found is x and kwargs == {}
