"""Tools for authors of backends: a conformance suite that says when a backend is right.

from qcore.testing import BackendConformance

class TestMyChip(BackendConformance):
    backend = "mychip"

What has no kernel although the BackendConfig claims it is listed in ``declines``. ``plugged_in`` lets any object with
hooks be the plugin of an installed backend for a while; ``FakeBackend`` makes such objects, and is an example to read.
"""

from qcore.testing.cases import CASES, EXTREME_CASES, Case
from qcore.testing.conformance import BackendConformance, ask_by_name, steps_apart
from qcore.testing.fake_backend import FakeBackend
from qcore.testing.plugging import plugged_in

__all__ = [
    "CASES",
    "EXTREME_CASES",
    "BackendConformance",
    "Case",
    "FakeBackend",
    "ask_by_name",
    "plugged_in",
    "steps_apart",
]
