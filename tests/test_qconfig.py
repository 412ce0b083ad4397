"""QConfig: a pair of constructors, and what their observers have in common."""

import pickle
from functools import partial

import pytest
import torch
from torch import nn

import qcore
from qcore import (
    FixedQParamsObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    QConfigMapping,
    QScheme,
    errors,
)
from qcore.qconfig import observer_traits, spec_of
from tests.small import prepare


def test_an_observer_instance():
    with pytest.raises(errors.ConfigError, match=r"activation=.*instance of MinMaxObserver.*MinMaxObserver.with_args"):
        QConfig(activation=MinMaxObserver(), weight=MinMaxObserver)


def test_observers_that_cannot_be_built_are_all_listed_with_their_rules():
    wrong = QConfig(MinMaxObserver.with_args(quant_min=3, quant_max=1), MinMaxObserver.with_args(dtype=torch.bool))
    with pytest.raises(errors.ConfigError) as caught:
        prepare(mapping=QConfigMapping().set_global(wrong).set_object_type(nn.Linear, QConfig(list, MinMaxObserver)))
    text = str(caught.value)
    assert "global, activation: MinMaxObserver: the range 3..1 must hold 0" in text
    assert "object_type Linear, activation" in text and "isn't a qcore observer" in text


def test_only_a_class_or_a_spec_can_be_told_a_range():
    spec = MinMaxObserver.with_args(reduce_range=True)
    assert spec_of(spec) is spec and spec_of(MinMaxObserver) == MinMaxObserver.with_args()
    assert spec_of(partial(MinMaxObserver)) is None and spec_of(int) is None
    chose = {c: observer_traits(c).has_explicit_range for c in (
        MinMaxObserver, spec, MinMaxObserver.with_args(quant_min=0, quant_max=255), partial(MinMaxObserver),
    )}  # fmt: skip
    assert list(chose.values()) == [False, True, True, True]


def test_traits_are_those_of_the_observers():
    traits = observer_traits(PerChannelMinMaxObserver.with_args(dtype=torch.qint8, ch_axis=1, eps=0.5))
    assert (traits.dtype, traits.ch_axis, traits.quant_min, traits.quant_max, traits.eps) == (
        torch.int8,
        1,
        -128,
        127,
        0.5,
    )
    assert traits.qscheme.per_channel and not (traits.is_dynamic or traits.is_placeholder or traits.fixed)
    assert observer_traits(MinMaxObserver).eps is None and observer_traits(MinMaxObserver).ch_axis is None
    assert observer_traits(FixedQParamsObserver.with_args(scale=0.5, zero_point=3)).fixed == (0.5, 3)
    placeholder = observer_traits(PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True))
    assert placeholder.is_placeholder and placeholder.is_dynamic and placeholder.dtype is torch.float16


@pytest.mark.parametrize(
    ("constructor", "message"),
    [
        (lambda: nn.Identity(), "builds a torch.nn.modules.linear.Identity, which isn't a qcore observer"),
        (FixedQParamsObserver, "can't be built without arguments"),
        (MinMaxObserver.with_args(quant_min=9, quant_max=1), "^MinMaxObserver: the range"),
    ],
)
def test_what_builds_no_observer_is_refused(constructor, message):
    with pytest.raises(errors.ConfigError, match=message):
        observer_traits(constructor)


def test_what_is_no_constructor_is_told_of_both_at_once():
    with pytest.raises(errors.ConfigError) as caught:
        QConfig(activation=None, weight=MinMaxObserver())
    assert len(caught.value.problems) == 2


def test_the_defaults_are_what_their_names_say():
    for name in (
        "default_qconfig",
        "default_per_channel_qconfig",
        "default_dynamic_qconfig",
        "default_weight_only_qconfig",
    ):
        config = getattr(qcore, name)
        weight, activation = observer_traits(config.weight), observer_traits(config.activation)
        assert weight.dtype is torch.int8 and weight.qscheme.symmetric
        assert weight.qscheme is (
            QScheme.per_tensor_symmetric if name == "default_qconfig" else QScheme.per_channel_symmetric
        )
        assert activation.is_dynamic == ("dynamic" in name)
        assert activation.is_placeholder == ("dynamic" in name or "weight_only" in name)
        assert pickle.loads(pickle.dumps(config)) == config
