"""The core's own backend against the conformance suite; it shows that the suite itself is sound."""

from qcore.testing import BackendConformance


class TestConformance(BackendConformance):
    lowers = False
    backend = "reference"
