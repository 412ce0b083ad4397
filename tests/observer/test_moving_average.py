"""Moving averages of each batch's ends."""

import pytest
import torch

from qcore import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from tests.observer.helpers import qparams, seen


def test_a_moving_average_begins_with_the_first_batch():
    observer = seen(MovingAverageMinMaxObserver(averaging_constant=0.5), torch.tensor([0.0, 2.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (0.0, 2.0)
    seen(observer, torch.tensor([-2.0, 4.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-1.0, 3.0)


def test_the_constant_is_the_weight_of_the_newest_batch():
    observer = seen(MovingAverageMinMaxObserver(0.25), torch.tensor([0.0, 4.0]), torch.tensor([-4.0, 8.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-1.0, 5.0)
    last = seen(MovingAverageMinMaxObserver(1.0), torch.tensor([0.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert (last.min_val.item(), last.max_val.item()) == (1.0, 2.0)


def test_each_channel_has_an_average_of_its_own_and_one_without_data_moves_nothing():
    nan = float("nan")
    observer = MovingAveragePerChannelMinMaxObserver(0.5)
    seen(observer, torch.tensor([[0.0, 2.0], [1.0, 3.0]]), torch.tensor([[nan, nan], [5.0, 7.0]]))
    assert observer.min_val.tolist() == [0.0, 3.0] and observer.max_val.tolist() == [2.0, 5.0]


def test_what_is_averaged_is_what_a_state_dict_goes_on_from():
    first, second = (MovingAverageMinMaxObserver(0.5) for _ in range(2))
    batches = [torch.tensor([0.0, float(n)]) for n in (1, 5, 3)]
    seen(first, *batches[:2])
    second.load_state_dict(first.state_dict())
    assert qparams(seen(first, batches[2])) == qparams(seen(second, batches[2]))
    assert first.max_val.item() == pytest.approx(3.0)
