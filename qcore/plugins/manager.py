"""Loads a backend's plugin when it is first asked for, and gives its hooks as one typed object."""

import importlib
import os
import warnings
from collections.abc import Sequence
from functools import cache, cached_property
from types import ModuleType

import pluggy
import torch
from torch import nn

from qcore._version import __version__
from qcore.backend_config import BackendConfig
from qcore.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    ConfigError,
    LoweringError,
    PluginError,
    QcoreWarning,
)
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule
from qcore.observer import ObserverBase
from qcore.plugins import hookspecs
from qcore.plugins.entry_points import InstalledBackend, installed_backends
from qcore.plugins.hookspecs import PLUGIN_API, REQUIRED, Availability, BackendInfo
from qcore.qconfig_mapping import QConfigMapping

#: Names of backends, separated by commas, that qcore shall treat as not installed.
DISABLE_VARIABLE = "QCORE_DISABLE_PLUGINS"

#: The backend that the core brings itself.
REFERENCE = "reference"


class Backend:
    """One backend: its plugin's hooks, called as needed.

    Args:
        installed: where it comes from.
        plugin: the module, or any object, with the hook implementations.

    Raises:
        PluginError: a hook is misspelt, takes arguments that it doesn't have, or a required one is missing; or the
            plugin was written for another version of the plugin API.
    """

    def __init__(self, installed: InstalledBackend, plugin: ModuleType | object) -> None:
        self.installed = installed
        manager = pluggy.PluginManager("qcore")
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(plugin, installed.name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise _plugin_error(installed, f"its hooks don't fit: {error}") from error
        self._hook = manager.hook
        missing = [name for name in REQUIRED if not getattr(manager.hook, name).get_hookimpls()]
        if missing:
            raise _plugin_error(installed, f"it doesn't implement {', '.join(missing)}")
        version = self.info.api_version
        if version != PLUGIN_API:
            raise _plugin_error(
                installed, f"it was written for plugin API {version}, this qcore has {PLUGIN_API}; update the older one"
            )
        if self.info.name != installed.name:
            raise _plugin_error(installed, f"it calls itself {self.info.name!r}; the entry point must have that name")

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.installed.name

    @cached_property
    def info(self) -> BackendInfo:
        """What the backend says of itself."""
        info: BackendInfo = self._hook.qcore_backend_info()
        return info

    @cached_property
    def availability(self) -> Availability:
        """Whether this machine can run it."""
        availability: Availability = self._hook.qcore_probe()
        return availability

    def backend_config(self) -> BackendConfig:
        """The patterns that its kernels accept on this machine."""
        config: BackendConfig = self._hook.qcore_backend_config()
        return config

    def fusion_patterns(self) -> Sequence[FusionPattern]:
        """Its rewrites."""
        return self._hook.qcore_fusion_patterns() or ()

    def observers(self) -> dict[type[ObserverBase], type[ObserverBase]]:
        """Its implementations of observers."""
        return dict(self._hook.qcore_observers() or {})

    def default_qconfig_mapping(self, version: int = 0) -> QConfigMapping:
        """Its default mapping, marked as its own.

        Raises:
            ConfigError: it has no such version.
        """
        versions = self.info.mapping_versions
        if type(version) is not int or version not in versions:
            listed = ", ".join(str(known) for known in versions)
            raise ConfigError(
                f"backend {self.name!r} has no version {version!r} of its default qconfig mapping; it has: {listed}"
            )
        mapping: QConfigMapping = self._hook.qcore_default_qconfig_mapping(version=version)
        mapping.backend, mapping.default_types = self.name, frozenset(mapping.object_type_qconfigs)
        return mapping

    def lower(self, reference: QGraphModule) -> nn.Module:
        """A reference model on its kernels.

        Raises:
            LoweringError: the plugin failed, or returned no module.
        """
        try:
            lowered = self._hook.qcore_lower(model=reference)
        except Exception as error:
            raise LoweringError(f"{_origin(self.installed)} failed to lower the model: {error}") from error
        if lowered is None:
            return reference
        if not isinstance(lowered, nn.Module):
            raise LoweringError(
                f"{_origin(self.installed)}: qcore_lower returned {type(lowered).__name__}, not a torch.nn.Module"
            )
        return lowered


def backend_names() -> list[str]:
    """The names of all installed backends that aren't disabled."""
    disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
    return [found.name for found in installed_backends() if found.name not in disabled]


def canonical_backend_name(name: str) -> str:
    """The name of the backend that answers to ``name``, which may be an alias.

    Raises:
        BackendNotFoundError: none does.
    """
    names = backend_names()
    for found in installed_backends():
        if found.name in names and name in (found.name, *found.aliases):
            return found.name
    listed = ", ".join(names) or "none"
    raise BackendNotFoundError(
        f"no backend {name!r} is installed; installed are: {listed}. Install it with: pip install "
        f"qcore-{name.replace('_', '-')}"
    )


def get_backend(name: str) -> Backend:
    """Load the plugin of a backend, once.

    Args:
        name: the backend's name or an alias.

    Raises:
        BackendNotFoundError: no such backend is installed.
        PluginError: its plugin can't be imported or registered.
    """
    return _load(canonical_backend_name(name))


def get_available_backend(name: str) -> Backend:
    """Load a backend that is to run here.

    Raises:
        BackendUnavailableError: this machine lacks what its kernels need.
    """
    backend = get_backend(name)
    if not backend.availability.ok:
        raise BackendUnavailableError(
            f"backend {backend.name!r} can't run on this machine: {backend.availability.reason}"
        )
    return backend


def best_backend() -> Backend:
    """The installed backend with the highest priority that this machine supports; the reference backend at least."""
    usable = []
    for name in backend_names():
        try:
            backend = get_backend(name)
        except PluginError as error:
            warnings.warn(f"left out in the choice of a backend: {error}", QcoreWarning, stacklevel=3)
            continue
        if backend.availability.ok:
            usable.append(backend)
    return max(usable, key=lambda backend: backend.info.priority)


@cache
def _load(name: str) -> Backend:
    installed = next(found for found in installed_backends() if found.name == name)
    try:
        plugin = importlib.import_module(installed.module)
    except Exception as error:
        raise _plugin_error(
            installed, f"importing {installed.module} failed: {type(error).__name__}: {error}"
        ) from error
    return Backend(installed, plugin)


def _origin(installed: InstalledBackend) -> str:
    return f"the plugin of backend {installed.name!r} ({installed.distribution} {installed.version})"


def _plugin_error(installed: InstalledBackend, problem: str) -> PluginError:
    return PluginError(
        f"{_origin(installed)} can't be used: {problem}. Found: qcore {__version__}, torch {torch.__version__}. "
        f"Reinstall it with: pip install --force-reinstall {installed.distribution}; or do without it: set "
        f"{DISABLE_VARIABLE}={installed.name}"
    )
