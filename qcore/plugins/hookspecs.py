"""Everything that a backend plugin may implement. This page is the whole hook surface.

A plugin is a module with functions of these names, marked with :data:`hookimpl` and found by an entry point of the
group ``qcore.backends`` whose name is the backend's::

    [project.entry-points."qcore.backends"]
    mychip = "qcore_mychip.plugin"

Another name for a backend is an entry point of the group ``qcore.aliases`` whose value is the backend's name, in the
distribution that brings the backend. Hooks return immutable data, or data that the caller may keep, and change nothing
that they are given. An answer is held to its type and shape (``answers.py``); whatever a hook raises, and whatever it
returns that it must not, is a ``PluginError`` that names plugin, distribution and hook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pluggy

from qcore.backend_config import BackendConfig
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule
from qcore.lowering.lowered import Lowered
from qcore.observer import ObserverBase
from qcore.qconfig_mapping import QConfigMapping

#: Version of this page; a plugin states the one that it was written for.
PLUGIN_API = 2

hookspec = pluggy.HookspecMarker("qcore")
hookimpl = pluggy.HookimplMarker("qcore")


@dataclass(frozen=True)
class BackendInfo:
    """What a backend says of itself.

    Attributes:
        name: the backend's name; the entry point's, too.
        api_version: the :data:`PLUGIN_API` that the plugin was written for.
        description: one line for people.
        priority: of several backends that this machine supports, ``backend=None`` takes the one with the highest.
        mapping_versions: the versions of its default qconfig mapping; no other is asked for.
    """

    name: str
    api_version: int
    description: str = ""
    priority: int = 0
    mapping_versions: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Availability:
    """Whether this machine can run a backend's kernels.

    Attributes:
        ok: whether it can.
        reason: what is missing, and what to do about it; empty if nothing is.
        isa: the instruction set that the kernels will use.
    """

    ok: bool
    reason: str = ""
    isa: str = ""


@hookspec(firstresult=True)
def qcore_backend_info() -> BackendInfo:
    """Name, plugin API version, description and priority. Required."""
    raise NotImplementedError


@hookspec(firstresult=True)
def qcore_probe() -> Availability:
    """Look whether this machine has what the kernels need. Required; called before the hooks below."""
    raise NotImplementedError


@hookspec(firstresult=True)
def qcore_backend_config() -> BackendConfig:
    """The patterns that the kernels accept, with their constraints on this machine. Required.

    Each element of a pattern is an operator of ``qcore.fx.operators``, a function, the name of a tensor's method, or a
    module class.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def qcore_fusion_patterns() -> Sequence[FusionPattern]:
    """Rewrites to apply before planning; usually ``qcore.fx.fuse.BATCH_NORM_FUSIONS``. Without it: none."""
    raise NotImplementedError


@hookspec(firstresult=True)
def qcore_observers() -> Mapping[type[ObserverBase], type[ObserverBase]]:
    """Observers of the backend's own, by the class that each stands in for. Without it: none.

    Each is a subclass of the class that it stands in for.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def qcore_default_qconfig_mapping(version: int) -> QConfigMapping:
    """The mapping that works best on this backend; a new version never changes an old one. Required."""
    raise NotImplementedError


@hookspec(firstresult=True)
def qcore_lower(model: QGraphModule) -> Lowered:
    """Turn a reference model into one on the backend's kernels. Without it: the reference model itself runs.

    ``qcore.lowering.lower_with_rules`` does it from a table of kernels, ``qcore.lowering.lower_with_engine`` with a
    compiler that takes subgraphs; either gives the answer. ``model`` stays as it is.
    """
    raise NotImplementedError


REQUIRED = ("qcore_backend_info", "qcore_probe", "qcore_backend_config", "qcore_default_qconfig_mapping")
