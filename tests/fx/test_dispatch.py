"""A mode of one thread leaves nothing behind for the others."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from qcore.fx.dispatch import DispatchMode
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


class Notes(DispatchMode):
    """Notes the names of operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators_of_its_own_thread_and_only_while_it_lasts():
    x = torch.ones(2)
    with Notes() as outer:
        x.exp()
        with Notes() as inner:
            x.sin()
        thread = threading.Thread(target=x.cos)
        thread.start()
        thread.join()
    x.neg()
    # What the inner one calls reaches the outer one.
    assert (outer.seen, inner.seen) == (["exp", "sin"], ["sin"])
    assert not is_in_torch_dispatch_mode()


def test_a_mode_that_ends_by_an_error_is_over():
    for _ in range(2):
        with pytest.raises(KeyError), Notes():
            raise KeyError
        assert not is_in_torch_dispatch_mode()
