"""The core's own backend against the conformance suite; it shows that the suite itself is sound."""

from qcore.testing import BackendConformance


class TestConformance(BackendConformance):
    replays = False  # Its models are what converted ones are held against: they run as they are written.
    lowers = False
    backend = "reference"
