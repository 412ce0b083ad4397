"""Plugins that are installed for one test."""

import contextlib
import importlib

import pytest

from qcore.plugins import entry_points
from qcore.testing import plugged_in


@pytest.fixture
def install():
    """Makes objects appear as the plugins of installed backends."""
    with contextlib.ExitStack() as stack:
        yield lambda name, plugin, aliases=(), **where: stack.enter_context(
            plugged_in(name, plugin, aliases, **{"version": "1.2.3", **where})
        )


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Makes distributions of metadata and modules, just as an installer leaves them."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(distribution, backends="", aliases="", module="", code="", metadata=True):
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
        (info / "entry_points.txt").write_text(f"[qcore.backends]\n{backends}\n[qcore.aliases]\n{aliases}\n")
        if module:
            (tmp_path / f"{module}.py").write_text(code)
        entry_points.installed_backends.cache_clear()
        importlib.invalidate_caches()

    yield add
    entry_points.installed_backends.cache_clear()
