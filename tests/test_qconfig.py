"""QConfig: a pair of constructors, and what their observers have in common."""

import pytest
import torch
from torch import nn

from qcore import MinMaxObserver, QConfig, QConfigMapping, errors
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
