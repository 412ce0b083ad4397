"""The hooks of the backend ``fbgemm``."""

from collections.abc import Mapping, Sequence

import torch
from qcore_torch_kernels.graph import lower

from qcore.backend_config import BackendConfig
from qcore.dtypes import QScheme
from qcore.fx.fuse import FusionPattern
from qcore.fx.graph_module import QGraphModule
from qcore.lowering import Lowered
from qcore.observer import HistogramObserver, MinMaxObserver, ObserverBase, PerChannelMinMaxObserver
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import QConfigMapping
from qcore_fbgemm import kernels
from qcore_fbgemm.backend_config import TRANSPOSED, backend_config
from qcore_fbgemm.fusion import FUSION_PATTERNS
from qcore_fbgemm.lowering import RULES
from qcore_fbgemm.observers import stand_ins


@hookimpl
def qcore_backend_info() -> BackendInfo:
    """The second choice on an x86 CPU."""
    return BackendInfo("fbgemm", PLUGIN_API, "torch's FBGEMM kernels", priority=20)


@hookimpl
def qcore_probe() -> Availability:
    """A torch that was built with FBGEMM, on a CPU that it supports."""
    engines = kernels.supported_engines()
    if kernels.ENGINE not in engines:
        return Availability(
            False,
            f"torch {torch.__version__} offers the engines {', '.join(engines) or 'none'} here, not {kernels.ENGINE}; "
            "use another backend, or a build of torch that has it",
        )
    isa = "AVX-512 VNNI" if kernels.has_vnni() else "no AVX-512 VNNI"
    return Availability(True, isa=f"{torch.backends.cpu.get_cpu_capability()}, {isa}: some weights are scaled")


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
    activation = HistogramObserver.with_args()
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.int8, qscheme=QScheme.per_channel_symmetric, rounding="sum_preserving"
    )
    mapping = QConfigMapping().set_global(QConfig(activation, weight))
    whole = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)
    for object_type in TRANSPOSED:
        mapping.set_object_type(object_type, QConfig(activation, whole))
    return mapping


@hookimpl
def qcore_lower(model: QGraphModule) -> Lowered:
    """By the table of rules in ``lowering.py``."""
    return lower(model, RULES, enter=kernels.Quantize, leave=kernels.Dequantize)
