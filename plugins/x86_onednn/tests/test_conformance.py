"""The backend against the core's conformance suite."""

from qcore.testing import BackendConformance


class TestConformance(BackendConformance):
    backend = "x86_onednn"
