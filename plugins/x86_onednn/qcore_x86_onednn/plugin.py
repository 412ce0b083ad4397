"""The hooks of the backend ``x86_onednn``."""

import platform
from collections.abc import Mapping, Sequence

import torch
from qcore_torch_kernels.configs import default_mapping
from qcore_torch_kernels.graph import lower

from qcore.backend_config import BackendConfig
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule
from qcore.lowering import Lowered
from qcore.observer import ObserverBase
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.qconfig_mapping import QConfigMapping
from qcore_x86_onednn import kernels
from qcore_x86_onednn.backend_config import backend_config
from qcore_x86_onednn.fusion import FUSION_PATTERNS
from qcore_x86_onednn.lowering import IN_FLOAT, RULES
from qcore_x86_onednn.observers import stand_ins


@hookimpl
def qcore_backend_info() -> BackendInfo:
    """The first choice on an x86 CPU."""
    return BackendInfo("x86_onednn", PLUGIN_API, "oneDNN kernels, and FBGEMM's where they are faster", priority=30)


@hookimpl
def qcore_probe() -> Availability:
    """An x86 CPU, and a torch that has the kernels."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return Availability(False, f"its kernels are for x86-64, this machine is {machine}; use the backend qnnpack")
    missing = kernels.missing_kernels()
    if missing:
        return Availability(False, f"torch {torch.__version__} lacks {', '.join(missing)}; install a torch with oneDNN")
    isa = "VNNI" if kernels.has_vnni() else "no VNNI: some weights are scaled so that 16-bit sums can't saturate"
    return Availability(True, isa=f"{torch.backends.cpu.get_cpu_capability()}, {isa}")


@hookimpl
def qcore_backend_config() -> BackendConfig:
    """What the kernels accept on this CPU."""
    return backend_config(pairs_saturate=not kernels.has_vnni())


@hookimpl
def qcore_fusion_patterns() -> Sequence[FusionPattern]:
    """Batch norms are folded."""
    return FUSION_PATTERNS


@hookimpl
def qcore_observers() -> Mapping[type[ObserverBase], type[ObserverBase]]:
    """Weight observers that keep 16-bit sums from saturating, on CPUs where they could."""
    return {} if kernels.has_vnni() else stand_ins()


@hookimpl
def qcore_default_qconfig_mapping(version: int) -> QConfigMapping:
    """uint8 activations by least squared error, int8 weights per channel whose rounding keeps each channel's sum."""
    return default_mapping()


@hookimpl
def qcore_lower(model: QGraphModule) -> Lowered:
    """By the table of rules in ``lowering.py``."""
    return lower(model, RULES, enter=IN_FLOAT.enter, leave=IN_FLOAT.leave)
