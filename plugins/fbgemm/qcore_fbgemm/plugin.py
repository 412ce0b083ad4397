"""The hooks of the backend ``fbgemm``."""

from collections.abc import Mapping, Sequence

from qcore_torch_kernels.configs import default_mapping, transposed_types
from qcore_torch_kernels.engines import availability
from qcore_torch_kernels.graph import lower

from qcore.backend_config import BackendConfig
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule
from qcore.lowering import Lowered
from qcore.observer import ObserverBase
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.qconfig_mapping import QConfigMapping
from qcore_fbgemm import kernels
from qcore_fbgemm.backend_config import backend_config
from qcore_fbgemm.fusion import FUSION_PATTERNS
from qcore_fbgemm.lowering import IN_FLOAT, RULES
from qcore_fbgemm.observers import stand_ins


@hookimpl
def qcore_backend_info() -> BackendInfo:
    """The second choice on an x86 CPU."""
    return BackendInfo("fbgemm", PLUGIN_API, "torch's FBGEMM kernels", priority=20)


@hookimpl
def qcore_probe() -> Availability:
    """A torch that was built with FBGEMM, on a CPU that it supports."""
    isa = "AVX-512 VNNI" if kernels.has_vnni() else "no AVX-512 VNNI"
    return availability(kernels.ENGINE, f"{isa}: some weights are scaled")


@hookimpl
def qcore_backend_config() -> BackendConfig:
    """What the kernels accept on this CPU."""
    return backend_config(kernels.has_vnni())


@hookimpl
def qcore_fusion_patterns() -> Sequence[FusionPattern]:
    """Batch norms are folded."""
    return FUSION_PATTERNS


@hookimpl
def qcore_observers() -> Mapping[type[ObserverBase], type[ObserverBase]]:
    """Weight observers that keep 16-bit sums from saturating."""
    return stand_ins(kernels.has_vnni())


@hookimpl
def qcore_default_qconfig_mapping(version: int) -> QConfigMapping:
    """uint8 activations by least squared error, int8 weights per channel whose rounding keeps each channel's sum.

    Transposed convolutions, whose kernels know no scales per channel, get one scale for the whole weight.
    """
    return default_mapping(transposed_types(3))


@hookimpl
def qcore_lower(model: QGraphModule) -> Lowered:
    """By the table of rules in ``lowering.py``."""
    return lower(model, RULES, enter=IN_FLOAT.enter, leave=IN_FLOAT.leave)
