"""Reads which backends are installed, from their distributions' metadata; imports nothing of them."""

from dataclasses import dataclass
from functools import cache

BACKENDS = "qcore.backends"
ALIASES = "qcore.aliases"


@dataclass(frozen=True)
class InstalledBackend:
    """One entry point of the group ``qcore.backends``.

    Attributes:
        name: the backend's name.
        module: the module that implements the hooks.
        distribution: the distribution that brings it.
        version: that distribution's version.
        aliases: other names that it answers to.
    """

    name: str
    module: str
    distribution: str
    version: str
    aliases: tuple[str, ...] = ()


@cache
def installed_backends() -> tuple[InstalledBackend, ...]:
    """All installed backends, by name. Scanned once; ``installed_backends.cache_clear()`` scans anew."""
    import importlib_metadata  # Here, as importing it takes as long as a fifth of the core, and few programs need it.

    aliases: dict[str, list[str]] = {}
    for entry_point in importlib_metadata.entry_points(group=ALIASES):
        aliases.setdefault(entry_point.value, []).append(entry_point.name)
    found = {
        entry_point.name: InstalledBackend(
            entry_point.name,
            entry_point.value,
            entry_point.dist.name if entry_point.dist else "unknown",
            entry_point.dist.version if entry_point.dist else "unknown",
            tuple(sorted(aliases.get(entry_point.name, ()))),
        )
        for entry_point in importlib_metadata.entry_points(group=BACKENDS)
    }
    return tuple(found[name] for name in sorted(found))
