"""A mode of one thread leaves nothing behind for the others."""

import threading

import pytest
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qcore.fx.guard import guarded


@pytest.mark.parametrize("ends_first", ["the other", "this"])
def test_overlapping_guards_leave_nothing_behind(ends_first):
    """Torch's compiler would let all code be, for good."""
    entered, end = threading.Event(), threading.Event()

    def guard():
        with guarded(()):
            entered.set()
            end.wait(60)

    other = threading.Thread(target=guard)
    with guarded(()):
        other.start()
        entered.wait(60)
        if ends_first == "the other":
            end.set()
            other.join()
            assert is_in_torch_dispatch_mode()
    end.set()
    other.join()
    assert not is_in_torch_dispatch_mode()
