"""The way of a part through the passes."""

import gc

from qcore.fx.prepare import garbage_left_alone


def test_the_garbage_collector_is_on_again_when_the_last_one_is_done():
    first, second = garbage_left_alone(), garbage_left_alone()
    assert gc.isenabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
