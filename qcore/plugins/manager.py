"""Finds the backend that a name stands for, loads its plugin when it is first asked for, and chooses a default."""

import importlib
import os
from functools import cache
from types import ModuleType
from typing import Any

from qcore.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    ConfigError,
    PluginError,
    QcoreWarning,
    did_you_mean,
    warn_caller,
)
from qcore.plugins.backend import DISABLE_VARIABLE, Backend, loading_error
from qcore.plugins.entry_points import REFERENCE as _REFERENCE
from qcore.plugins.entry_points import InstalledBackend, foreign_aliases, installed_backends, normalized

#: The name of the backend that the core brings itself.
REFERENCE = _REFERENCE.name

#: What has been loaded.
_loaded: dict[InstalledBackend, Backend] = {}


def backend_names() -> list[str]:
    """The names of all installed backends that aren't disabled."""
    return list(dict.fromkeys(found.name for found in _enabled()))


def canonical_backend_name(name: str) -> str:
    """The name of the backend that answers to ``name``, which may be an alias.

    Raises:
        BackendNotFoundError: none does.
        PluginError: several do.
    """
    return _claimant(name).name


def get_backend(name: str) -> Backend:
    """Load the plugin of a backend, once.

    Args:
        name: the backend's name or an alias.

    Raises:
        BackendNotFoundError: no such backend is installed.
        PluginError: its plugin can't be imported or registered, or several distributions claim the name.
    """
    installed = _claimant(name)
    if installed not in _loaded:  # Without a lock: importing has its own, and the first who is done wins.
        _loaded.setdefault(installed, Backend(installed, _plugin(installed)))
    return _loaded[installed]


def get_available_backend(name: str) -> Backend:
    """Load a backend that is to run here.

    Raises:
        BackendUnavailableError: this machine lacks what its kernels need.
    """
    backend = get_backend(name)
    if not backend.availability.ok:
        reason = backend.availability.reason or "it doesn't say why"
        raise BackendUnavailableError(f"backend {backend.name!r} can't run on this machine: {reason}")
    return backend


def best_backend() -> Backend:
    """The installed backend with the highest priority that this machine supports; the reference backend at least.

    What fails in any hook that is needed to prepare a model is left out, with a warning.
    """
    usable = []
    for name in backend_names():
        try:
            backend = get_backend(name)
            if backend.availability.ok:
                usable.append(backend)
        except PluginError as error:
            _left_out(error)
    for backend in sorted(usable, key=lambda backend: -backend.info.priority):
        try:
            backend.check()
        except PluginError as error:
            _left_out(error)
        else:
            return backend
    raise AssertionError("the reference backend is always usable")


def _left_out(error: PluginError) -> None:
    warn_caller(f"left out in the choice of a backend: {error}", QcoreWarning)


def _enabled() -> tuple[InstalledBackend, ...]:
    return _without(os.environ.get(DISABLE_VARIABLE, ""), installed_backends())


@cache
def _without(disabled: str, installed: tuple[InstalledBackend, ...]) -> tuple[InstalledBackend, ...]:
    """What is left of ``installed``; kept, so that a wrong name is warned of once."""
    gone: set[InstalledBackend] = set()
    for name in filter(None, map(str.strip, disabled.split(","))):
        named = _called(name, installed) or [b for b in installed if normalized(b.distribution) == normalized(name)]
        if any(found.name == REFERENCE for found in named):
            warn_caller(f"{DISABLE_VARIABLE}: {name!r} can't be disabled, it is the core's own", QcoreWarning)
        elif not named:
            known = [known for b in installed for known in (b.name, *b.aliases, b.distribution)]
            question = did_you_mean(name, known) or f"installed are: {', '.join(known)}"
            warn_caller(f"{DISABLE_VARIABLE}: no backend {name!r} is installed; {question}", QcoreWarning)
        gone.update(named)
    return tuple(found for found in installed if found not in gone or found.name == REFERENCE)


def _called(name: str, backends: tuple[InstalledBackend, ...]) -> list[InstalledBackend]:
    """The backends that a name stands for; a backend's own name goes before any alias."""
    return [b for b in backends if b.name == name] or [b for b in backends if name in b.aliases]


def _claimant(name: str) -> InstalledBackend:
    """The one installed backend that ``name`` stands for."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a backend is asked for by its name, found {name!r}")
    called, enabled = _called(name, installed_backends()), _enabled()
    found = [backend for backend in called if backend in enabled]
    if len(found) == 1:
        return found[0]
    if found:
        raise _clash(name, found)
    listed = f"installed are: {', '.join(backend_names())}"
    if called:
        raise BackendNotFoundError(f"backend {called[0]} is disabled by {DISABLE_VARIABLE}; {listed}")
    foreign = "".join(
        f"; {distribution} calls {backend!r} so, but only the distribution that brings a backend may"
        for backend, distribution in foreign_aliases(name)
    )
    question = did_you_mean(name, [known for b in enabled for known in (b.name, *b.aliases)])
    advice = question or f"install it with: pip install qcore-{name.replace('_', '-')}"
    raise BackendNotFoundError(f"no backend {name!r} is installed; {listed}{foreign}; {advice}")


def _clash(name: str, found: list[InstalledBackend]) -> PluginError:
    claims = " and ".join(map(str, found))
    if found[0].name == name:
        cure = f"{DISABLE_VARIABLE}={found[-1].distribution}, or uninstall one of them"
        return PluginError(f"two distributions bring a backend {name!r}: {claims}. Do without one: set {cure}", name)
    cure = f"ask for one of them by its name, or set {DISABLE_VARIABLE}={found[-1].name}"
    return PluginError(f"several backends answer to {name!r}: {claims}; {cure}", name)


def _plugin(installed: InstalledBackend) -> ModuleType | Any:
    module, _, attribute = installed.module.partition(":")
    try:
        plugin = importlib.import_module(module)
        return getattr(plugin, attribute) if attribute else plugin
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A plugin that calls sys.exit is broken as any other.
        raise loading_error(
            installed, f"importing {installed.module} failed: {type(error).__name__}: {error}"
        ) from error
