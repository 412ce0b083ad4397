"""Qparams that are known beforehand."""

import copy

import pytest
import torch

from qcore import FixedQParamsObserver
from qcore.errors import ConfigError
from tests.observer.helpers import qparams, seen

X = torch.tensor([-1.0, 0.5, 3.0])


def test_qparams_are_those_given_whatever_is_seen():
    observer = seen(FixedQParamsObserver(1 / 128, 128), 100 * X, X[:0], X * float("nan"))
    scale, zero_point = observer.calculate_qparams()
    assert (scale.dtype, scale.dim(), zero_point.dtype, zero_point.dim()) == (torch.float32, 0, torch.int64, 0)
    assert qparams(observer) == qparams(copy.deepcopy(observer)) == (1 / 128, 128)
    assert observer.has_data and not observer.nonfinite_count and not observer.state_dict()


def test_the_zero_point_is_one_of_the_range_whichever_that_is():
    for arguments in ({"dtype": torch.int8}, {"quant_min": 0, "quant_max": 127}):
        assert FixedQParamsObserver(0.1, 127, **arguments).zero_point == 127
        with pytest.raises(ConfigError, match="lies outside the range"):
            FixedQParamsObserver(0.1, 128, **arguments)
