"""Reads which backends are installed, from their distributions' metadata; imports nothing of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from qcore._version import __version__
from qcore.errors import QcoreWarning, warn_caller

BACKENDS = "qcore.backends"
ALIASES = "qcore.aliases"


@dataclass(frozen=True)
class InstalledBackend:
    """One entry point of the group ``qcore.backends``.

    Attributes:
        name: the backend's name.
        module: the module that implements the hooks, or an object in it: ``"module:object"``.
        distribution: the distribution that brings it.
        version: that distribution's version.
        aliases: other names that it answers to.
    """

    name: str
    module: str
    distribution: str
    version: str
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


#: The backend that the core brings itself; no other distribution's takes its name.
REFERENCE = InstalledBackend("reference", "qcore.plugins.reference", "qcore-fx", __version__)


@cache
def installed_backends() -> tuple[InstalledBackend, ...]:
    """All installed backends, by name. Scanned once; ``installed_backends.cache_clear()`` scans anew.

    Two distributions may claim one name: both are listed, and neither is loaded when it is asked for. A name goes
    before an alias, and only the distribution that brings a backend can give it aliases.
    """
    points, aliases = list(_entry_points(BACKENDS)), list(_entry_points(ALIASES))
    names = {point.name for point in points} | {REFERENCE.name}
    found = [REFERENCE]
    for point in points:
        distribution, version = _distribution(point)
        own = {
            alias.name
            for alias in aliases
            if alias.value == point.name and _distribution(alias)[0] == distribution and alias.name not in names
        }
        made = InstalledBackend(point.name, point.value, distribution, version, tuple(sorted(own)))
        if made.name != REFERENCE.name:
            found.append(made)
        elif made.module != REFERENCE.module:
            warn_caller(f"backend {made} is left out: that name is the core's own", QcoreWarning)
    return tuple(sorted(found, key=lambda backend: (backend.name, backend.distribution)))


def foreign_aliases(alias: str) -> list[tuple[str, str]]:
    """The backends that some distribution calls ``alias`` without bringing them, each with that distribution."""
    return [(a.value, _distribution(a)[0]) for a in _entry_points(ALIASES) if a.name == alias]


def normalized(distribution: str) -> str:
    """A distribution's name as all ways of writing it have it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _entry_points(group: str) -> Iterable[Any]:
    import importlib_metadata  # Here, as importing it takes as long as a fifth of the core, and few programs need it.

    return importlib_metadata.entry_points(group=group)


def _distribution(entry_point: Any) -> tuple[str, str]:
    """Name and version; metadata that is damaged hides no backend."""
    try:
        return str(entry_point.dist.name), str(entry_point.dist.version)
    except Exception:
        return "unknown", "unknown"
