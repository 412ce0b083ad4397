"""Moving averages of each batch's ends."""

import torch

from qcore import (
    MovingAverageMinMaxObserver,
)
from tests.observer.helpers import seen


def test_a_moving_average_begins_with_the_first_batch():
    observer = seen(MovingAverageMinMaxObserver(averaging_constant=0.5), torch.tensor([0.0, 2.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (0.0, 2.0)
    seen(observer, torch.tensor([-2.0, 4.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-1.0, 3.0)
