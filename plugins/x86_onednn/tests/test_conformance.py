"""The backend against the core's conformance suite."""

from qcore.testing import BackendConformance


class TestConformance(BackendConformance):
    backend = "x86_onednn"
    declines = {"conv2d padding same, even kernel": "isn't symmetric here"}  # noqa: RUF012
