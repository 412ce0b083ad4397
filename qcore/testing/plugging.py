"""Backends that are there for the length of a ``with``: for tests of a plugin before it is packaged, and of toys."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from qcore.plugins import manager
from qcore.plugins.entry_points import InstalledBackend

_numbers = itertools.count()


@contextmanager
def plugged_in(
    name: str, plugin: Any, aliases: tuple[str, ...] = (), distribution: str = "", version: str = "0"
) -> Iterator[InstalledBackend]:
    """Let any object with hooks be the plugin of an installed backend.

    Args:
        name: the backend's.
        plugin: a module, or an object whose attributes are hooks.
        aliases: other names for it.
        distribution: by default ``qcore-`` and the name.
        version: of the distribution.
    """
    module = f"qcore_plugged_in_{next(_numbers)}"
    installed = InstalledBackend(name, module, distribution or f"qcore-{name}", version, aliases)
    others = vars(manager)["installed_backends"]
    sys.modules[module] = plugin
    try:
        with patch.object(manager, "installed_backends", lambda: (*others(), installed)):
            yield installed
    finally:
        sys.modules.pop(module, None)
