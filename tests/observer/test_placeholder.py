"""A dtype and nothing else."""

import pytest
import torch

from qcore import PlaceholderObserver

X = torch.tensor([-1.0, 0.5, float("nan")])


def test_it_watches_nothing_and_gives_no_qparams():
    placeholder = PlaceholderObserver(dtype=torch.float16, is_dynamic=True)
    assert placeholder.has_data and placeholder(X) is X
    assert not placeholder.nonfinite_count and not placeholder.state_dict()
    with pytest.raises(NotImplementedError, match="gives no qparams"):
        placeholder.calculate_qparams()


def test_it_says_a_dtype_and_whether_the_range_is_taken_at_run_time():
    observer = PlaceholderObserver(dtype=torch.float16)
    assert (observer.dtype, observer.is_dynamic) == (torch.float16, False)
    assert PlaceholderObserver(dtype=torch.quint8, is_dynamic=True).dtype is torch.uint8
