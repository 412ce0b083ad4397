"""Names of the whole process that mean something else to one thread for a while, and to no other."""

import math
import threading
from types import SimpleNamespace

import pytest

from qcore.fx.patches import Patches, unpatched


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(60)
    return found[0]


def original(x):
    return ("original", x)


@pytest.fixture
def owner():
    return SimpleNamespace(call=original)


def test_this_thread_gets_the_replacement_and_another_what_was_there(owner):
    with Patches([(owner, "call", lambda x: ("replaced", x))]):
        assert owner.call(1) == ("replaced", 1)
        assert in_another_thread(lambda: owner.call(2)) == ("original", 2)
        assert unpatched(owner, "call") is original
    assert owner.call is original


def test_what_was_there_is_put_back_after_an_error(owner):
    with pytest.raises(KeyError), Patches([(owner, "call", abs)]):
        raise KeyError
    assert owner.call is original


def test_within_others_the_inner_ones_count_and_then_the_outer_ones_again(owner):
    with Patches([(owner, "call", lambda x: 1)]):
        with Patches([(owner, "call", lambda x: 2)]):
            assert owner.call(0) == 2
        assert owner.call(0) == 1
    assert owner.call is original


def test_the_last_thread_puts_back(owner):
    """Whichever began: else the first to end would take the other's name from under it, or leave its own for good."""
    inside, go_on = threading.Event(), threading.Event()
    seen = []

    def other():
        with Patches([(owner, "call", lambda x: "other's")]):
            inside.set()
            go_on.wait(60)
            seen.append(owner.call(0))

    thread = threading.Thread(target=other)
    with Patches([(owner, "call", lambda x: "mine")]):
        thread.start()
        inside.wait(60)
        assert owner.call(0) == "mine"
    assert owner.call is not original and owner.call(0) == ("original", 0)
    go_on.set()
    thread.join()
    assert seen == ["other's"] and owner.call is original


def test_a_builtin_is_shadowed_in_one_namespace_and_leaves_no_name_there():
    space = {}
    with Patches([(space, "isinstance", lambda value, classes: "asked")]):
        assert eval("isinstance(1, int)", space) == "asked"
        assert in_another_thread(lambda: eval("isinstance(1, int)", space)) is True
        assert unpatched(space, "isinstance") is None
    assert "isinstance" not in space


def test_what_somebody_else_put_there_meanwhile_stays(owner):
    with Patches([(owner, "call", lambda x: "mine")]):
        switch = owner.call
        owner.call = theirs = lambda x: ("theirs", switch(x))
        assert owner.call(0) == ("theirs", "mine")
    assert owner.call is theirs and owner.call(0) == ("theirs", ("original", 0))


def test_names_may_be_added_later_and_go_with_the_rest(owner):
    before = math.sqrt
    with Patches() as patches:
        patches.add(owner, "call", lambda x: "late")
        patches.add(vars(math), "sqrt", lambda x: "root")
        assert owner.call(0) == "late" and math.sqrt(4) == "root"
    assert owner.call is original and math.sqrt is before
