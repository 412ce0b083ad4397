"""The backend that the core brings itself: no kernels, everything in float between quantize and dequantize.

It accepts every operator that qcore knows, on any machine, with any integer dtype and scheme; so the core alone
prepares, calibrates and runs. It goes through the same hooks as any plugin.
"""

from collections.abc import Sequence

import torch
from torch import fx

from qcore.backend_config import BackendConfig, BackendPatternConfig, Condition, DTypeConfig, DTypeWithConstraints
from qcore.fx import operators as op
from qcore.fx.fuse import BATCH_NORM_FUSIONS, FusionPattern
from qcore.fx.sharing import sharing_patterns
from qcore.plugins.hookspecs import PLUGIN_API, Availability, BackendInfo, hookimpl
from qcore.qconfig import QConfig, default_histogram_observer, default_per_channel_weight_observer
from qcore.qconfig_mapping import QConfigMapping

_OWN_OUTPUT = (
    *op.CONV, *op.CONV_TRANSPOSE, op.LINEAR, *op.RNN_CELLS, op.BATCH_NORM, op.ADD, op.MUL, op.MATMUL, *op.AVG_POOL,
    *op.ADAPTIVE_AVG_POOL, op.MEAN, op.HARDSWISH, op.LEAKY_RELU, op.ELU, op.SILU, op.GELU, op.INTERPOLATE,
)  # fmt: skip
_ONE_SIDED_FIXED = (op.SIGMOID, op.HARDSIGMOID, op.SOFTMAX)


def _is_read_by_an_operator(node: fx.Node) -> bool:
    readers = list(node.users)
    while readers:
        reader = readers.pop()
        operator = op.operator_of(reader)
        if operator is not None and operator.kind is not op.Kind.COMPUTE:
            readers.extend(reader.users)
        elif reader.op != "output":
            return True
    return False


#: What an operator reads as float isn't rounded; what only the model's caller reads is, as by any kernel.
READ_BY_AN_OPERATOR = Condition("read by an operator", _is_read_by_an_operator)


@hookimpl
def qcore_backend_info() -> BackendInfo:
    """The lowest priority: any backend with kernels is better."""
    return BackendInfo("reference", PLUGIN_API, "float between quantize and dequantize, on any machine", -1)


@hookimpl
def qcore_probe() -> Availability:
    """Nothing is needed."""
    return Availability(True, isa="any")


@hookimpl
def qcore_backend_config() -> BackendConfig:
    """Every operator in normal form, with any dtypes."""
    anything = DTypeConfig()
    # The range of the input is taken at run time, or only the weight is quantized.
    dynamic = DTypeConfig(output_dtype=torch.float32, is_dynamic=True)
    weight_only = DTypeConfig(torch.float32, torch.float32)
    gives_float = DTypeConfig(output_dtype=torch.float32)
    patterns = [BackendPatternConfig(operator, dtype_configs=[anything]) for operator in _OWN_OUTPUT]
    for operator in (*op.CONV, *op.CONV_TRANSPOSE, op.LINEAR):
        patterns.append(BackendPatternConfig(operator, dtype_configs=[dynamic, weight_only, anything]))
        read = BackendPatternConfig(operator, dtype_configs=[dynamic, weight_only, gives_float, anything])
        patterns.append(read.set_condition(READ_BY_AN_OPERATOR))
    patterns += sharing_patterns(anything)
    fixed = dict.fromkeys(_ONE_SIDED_FIXED, _fixed_output(1.0 / 256.0, 0)) | {op.TANH: _fixed_output(2.0 / 256.0, 128)}
    patterns += [BackendPatternConfig(operator, dtype_configs=[own, anything]) for operator, own in fixed.items()]
    return BackendConfig("reference").set_backend_pattern_configs(patterns)


def _fixed_output(scale: float, zero_point: int) -> DTypeConfig:
    output = DTypeWithConstraints(torch.uint8, scale_exact_match=scale, zero_point_exact_match=zero_point)
    return DTypeConfig(input_dtype=torch.uint8, output_dtype=output)


@hookimpl
def qcore_fusion_patterns() -> Sequence[FusionPattern]:
    """Batch norms are folded."""
    return BATCH_NORM_FUSIONS


@hookimpl
def qcore_default_qconfig_mapping(version: int) -> QConfigMapping:
    """uint8 activations by least squared error, int8 weights per channel whose rounding keeps each channel's sum."""
    weight = default_per_channel_weight_observer.with_args(rounding="sum_preserving")
    return QConfigMapping().set_global(QConfig(default_histogram_observer, weight))
