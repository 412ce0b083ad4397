"""The fake backend passes the conformance suite."""

from collections.abc import Iterator

import pytest

from qcore.testing import BackendConformance, FakeBackend, plugged_in


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with plugged_in("fake", FakeBackend().plugin()):
        yield


class TestConformance(BackendConformance):
    backend = "fake"
