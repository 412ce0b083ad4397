"""One backend's plugin as a typed object: every hook is called in one place, which holds its answer to the rules."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any

import pluggy
import torch
from torch import nn

from qcore._version import __version__
from qcore.backend_config import BackendConfig
from qcore.errors import ConfigError, LoweringError, PluginError
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule
from qcore.lowering.lowered import Lowered, converted
from qcore.observer import ObserverBase
from qcore.plugins import hookspecs
from qcore.plugins.answers import ANSWERS, snapshot, unlike
from qcore.plugins.entry_points import InstalledBackend
from qcore.plugins.hookspecs import PLUGIN_API, REQUIRED, Availability, BackendInfo
from qcore.qconfig_mapping import QConfigMapping

#: Backends to treat as not installed, separated by commas: names, aliases or distributions.
DISABLE_VARIABLE = "QCORE_DISABLE_PLUGINS"


class Backend:
    """One backend: its plugin's hooks, called as needed.

    Every method that calls a hook raises a :class:`~qcore.errors.PluginError` (``lower`` a
    :class:`~qcore.errors.LoweringError`) that names plugin and hook, if the hook fails or its answer is none.

    Args:
        installed: where it comes from.
        plugin: the module, or any object, with the hook implementations.

    Raises:
        PluginError: a hook is misspelt, isn't marked, takes arguments that it doesn't have, or a required one is
            missing; or the plugin was written for another version of the plugin API.
    """

    def __init__(self, installed: InstalledBackend, plugin: ModuleType | object) -> None:
        self.installed = installed
        self._lock = threading.RLock()
        manager = pluggy.PluginManager("qcore")
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(plugin, installed.name)
            manager.check_pending()
        except Exception as error:
            raise loading_error(installed, f"its hooks don't fit: {error}") from error
        unmarked = [name for name in dir(plugin) if _is_unmarked_hook(manager, plugin, name)]
        if unmarked:
            raise loading_error(installed, f"{', '.join(unmarked)} isn't marked with @hookimpl, or is no function")
        self._hook = manager.hook
        missing = [name for name in REQUIRED if not self._has(name)]
        if missing:
            raise loading_error(installed, f"it doesn't implement {', '.join(missing)}")
        version = self.info.api_version
        if version != PLUGIN_API:
            raise loading_error(
                installed, f"it was written for plugin API {version}, this qcore has {PLUGIN_API}; update the older one"
            )
        if self.info.name != installed.name:
            raise loading_error(installed, f"it calls itself {self.info.name!r}; the entry point must have that name")

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.installed.name

    @cached_property
    def info(self) -> BackendInfo:
        """What the backend says of itself."""
        info: BackendInfo = self._ask("qcore_backend_info")
        return info

    @property
    def availability(self) -> Availability:
        """Whether this machine can run it; looked for once, by one thread."""
        with self._lock:
            return self._availability

    @cached_property
    def _availability(self) -> Availability:
        availability: Availability = self._ask("qcore_probe")
        return availability

    def backend_config(self) -> BackendConfig:
        """The patterns that its kernels accept on this machine; the caller's to keep and change."""
        config: BackendConfig = self._ask("qcore_backend_config")
        return config.copy()

    def fusion_patterns(self) -> Sequence[FusionPattern]:
        """Its rewrites."""
        return tuple(self._ask("qcore_fusion_patterns")) if self._has("qcore_fusion_patterns") else ()

    def observers(self) -> dict[type[ObserverBase], type[ObserverBase]]:
        """Its own observers, by the class that each stands in for."""
        return dict(self._ask("qcore_observers")) if self._has("qcore_observers") else {}

    def default_qconfig_mapping(self, version: int = 0) -> QConfigMapping:
        """Its default mapping, marked as its own; the caller's to keep and change.

        Raises:
            ConfigError: it has no such version.
        """
        versions = self.info.mapping_versions
        if type(version) is not int or version not in versions:
            listed = ", ".join(str(known) for known in versions)
            raise ConfigError(
                f"backend {self.name!r} has no version {version!r} of its default qconfig mapping; it has: {listed}"
            )
        mapping: QConfigMapping = copy.deepcopy(self._ask("qcore_default_qconfig_mapping", version=version))
        mapping.backend, mapping.default_types = self.name, frozenset(mapping.object_type_qconfigs)
        return mapping

    def lower(self, reference: QGraphModule) -> nn.Module:
        """A reference model on its kernels; the reference model itself, if it has no hook for that.

        Raises:
            LoweringError: the plugin failed, changed the reference model, or gave something that isn't that model.
        """
        if not self._has("qcore_lower"):
            return reference
        before = snapshot(reference)
        lowered: Lowered = self._ask("qcore_lower", model=reference)
        if snapshot(reference) != before:
            raise self._error("qcore_lower", "changed the reference model that it was given, and must give another")
        with self.answers_for("qcore_lower"):
            problem = unlike(reference, lowered)
        if problem:
            raise self._error("qcore_lower", problem)
        return converted(reference, lowered)

    @cached_property
    def _is_checked(self) -> bool:
        self.backend_config(), self.fusion_patterns(), self.observers(), self.default_qconfig_mapping()
        return True

    def check(self) -> None:
        """Call each hook that preparing needs, once."""
        assert self._is_checked

    @contextmanager
    def answers_for(self, *hooks: str) -> Iterator[None]:
        """Name the plugin in what fails where the answer of one of these hooks is used."""
        try:
            yield
        except PluginError as error:
            if error.backend or error.hook not in hooks:
                raise
            raise self._error(error.hook, f"gave what failed later: {error}") from error.__cause__

    def _has(self, hook: str) -> bool:
        return bool(getattr(self._hook, hook).get_hookimpls())

    def _ask(self, hook: str, **arguments: Any) -> Any:
        """A hook's answer. No other place calls a hook."""
        try:
            answer = getattr(self._hook, hook)(**arguments)
            problem = ANSWERS[hook](answer)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too, is an answer that is none.
            raise self._error(hook, f"failed: {type(error).__name__}: {error}") from error
        if problem:
            raise self._error(hook, problem)
        return answer

    def _error(self, hook: str, problem: str) -> PluginError:
        kind = LoweringError if hook == "qcore_lower" else PluginError
        return _error_of(self.installed, f"its hook {hook} {problem}", kind, hook)


def loading_error(installed: InstalledBackend, problem: str) -> PluginError:
    """The error of a plugin that can't be loaded."""
    return _error_of(installed, f"can't be used: {problem}", PluginError, "")


def _error_of(installed: InstalledBackend, problem: str, kind: type[PluginError], hook: str) -> PluginError:
    origin = f"{installed.distribution} {installed.version}"
    separator = ":" if hook else ""
    return kind(
        f"the plugin of backend {installed.name!r} ({origin}){separator} {problem}. Found: qcore {__version__}, torch "
        f"{torch.__version__}. Reinstall it with: pip install --force-reinstall {installed.distribution}; or do "
        f"without it: set {DISABLE_VARIABLE}={installed.name}",
        installed.name,
        origin,
        hook,
    )


def _is_unmarked_hook(manager: pluggy.PluginManager, plugin: object, name: str) -> bool:
    """Whether an attribute is meant as a hook, and pluggy doesn't take it as one."""
    if not name.startswith("qcore_") or manager.parse_hookimpl_opts(plugin, name) is not None:
        return False
    value = getattr(plugin, name)
    return hasattr(hookspecs, name) or (callable(value) and not isinstance(value, type))
