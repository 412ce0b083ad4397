"""Reads which backends are installed, from their distributions' metadata; imports nothing of them."""

import re
from dataclasses import dataclass, replace
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
    points, aliases = _entry_points(BACKENDS), _entry_points(ALIASES)
    names = {point.name for point in points} | {REFERENCE.name}
    found = [REFERENCE]
    for point in points:
        own = {a.name for a in aliases if (a.module, a.distribution) == (point.name, point.distribution)}
        if point.name != REFERENCE.name:
            found.append(replace(point, aliases=tuple(sorted(own - names))))
        elif point.module != REFERENCE.module:
            warn_caller(f"backend {point} is left out: that name is the core's own", QcoreWarning)
    return tuple(sorted(found, key=lambda backend: (backend.name, backend.distribution)))


def foreign_aliases(alias: str) -> list[tuple[str, str]]:
    """The backends that some distribution calls ``alias`` without bringing them, each with that distribution."""
    return [(a.module, a.distribution) for a in _entry_points(ALIASES) if a.name == alias]


def normalized(distribution: str) -> str:
    """A distribution's name as all ways of writing it have it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _entry_points(group: str) -> list[InstalledBackend]:
    """The entry points of a group; an alias has the backend's name in the place of its module."""
    import importlib_metadata  # Here, as importing it takes as long as a fifth of the core, and few programs need it.

    return [InstalledBackend(p.name, p.value, *_distribution(p)) for p in importlib_metadata.entry_points(group=group)]


def _distribution(entry_point: Any) -> tuple[str, str]:
    """Name and version; metadata that is damaged hides no backend."""
    try:
        return str(entry_point.dist.name), str(entry_point.dist.version)
    except Exception:
        return "unknown", "unknown"
