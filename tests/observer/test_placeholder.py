"""Qparams that are known beforehand."""

import pytest
import torch

from qcore import (
    FixedQParamsObserver,
    PlaceholderObserver,
)
from tests.observer.helpers import qparams

X = torch.tensor([-1.0, 0.5, 3.0])


def test_observers_without_data():
    assert qparams(FixedQParamsObserver(1 / 256, 3)) == (1 / 256, 3)
    placeholder = PlaceholderObserver(dtype=torch.float16, is_dynamic=True)
    assert placeholder.has_data and placeholder(X) is X
    with pytest.raises(NotImplementedError, match="gives no qparams"):
        placeholder.calculate_qparams()
