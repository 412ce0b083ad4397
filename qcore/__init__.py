"""qcore: FX graph mode quantization with a home of its own.

prepared = prepare_fx(model, get_default_qconfig_mapping("mychip"), (example,))
calibrate(prepared, batches)
quantized = convert_fx(prepared)
print(explain(quantized))
"""

from qcore._version import __version__
from qcore.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    Condition,
    DTypeConfig,
    DTypeWithConstraints,
    ObservationType,
)
from qcore.calibration import calibrate
from qcore.dtypes import QScheme
from qcore.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from qcore.migration import explain_missing as _explain_missing
from qcore.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from qcore.plugins.entry_points import InstalledBackend, installed_backends
from qcore.plugins.manager import get_backend
from qcore.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    default_histogram_observer,
    default_observer,
    default_per_channel_qconfig,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_qconfig,
    default_weight_observer,
    default_weight_only_qconfig,
)
from qcore.qconfig_mapping import QConfigMapping
from qcore.quantization_plan import Decision, QuantizationPlan
from qcore.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    explain,
    fuse_fx,
    get_default_qconfig_mapping,
    prepare_fx,
)

__all__ = [
    "BackendConfig",
    "BackendPatternConfig",
    "Condition",
    "ConvertCustomConfig",
    "DTypeConfig",
    "DTypeWithConstraints",
    "Decision",
    "FixedQParamsObserver",
    "HistogramObserver",
    "InstalledBackend",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObservationType",
    "ObserverBase",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "PrepareCustomConfig",
    "QConfig",
    "QConfigMapping",
    "QScheme",
    "QuantizationPlan",
    "__version__",
    "calibrate",
    "convert_fx",
    "convert_to_reference_fx",
    "default_dynamic_qconfig",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_qconfig",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_qconfig",
    "default_weight_observer",
    "default_weight_only_qconfig",
    "explain",
    "fuse_fx",
    "get_backend",
    "get_default_qconfig_mapping",
    "installed_backends",
    "prepare_fx",
]

_explain_missing(__name__)
