"""What QNNPACK's kernels accept, as tables."""

import torch
from torch import nn

from qcore.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    DTypeWithConstraints,
)
from qcore.dtypes import QScheme
from qcore.fx import operators as op
from qcore.fx.sharing import sharing_patterns

#: Operators with an output of their own scale.
UNWEIGHTED = (
    op.ADD, op.MUL, *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL, op.MEAN, op.HARDSWISH, op.LEAKY_RELU, op.ELU, op.INTERPOLATE,
)  # fmt: skip

#: Operators whose output lies in 0..1.
FIXED = (op.SIGMOID, op.HARDSIGMOID)

#: Transposed convolutions that have a kernel, as a mapping names them.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, *(operator.function for operator in op.CONV_TRANSPOSE[:2]))

ACTIVATION = DTypeWithConstraints(torch.uint8, qschemes=(QScheme.per_tensor_affine, QScheme.per_tensor_symmetric))


def backend_config() -> BackendConfig:
    """The patterns that the kernels accept, on any CPU."""
    per_channel = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_channel_symmetric,), ch_axis=0)
    per_tensor = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_tensor_symmetric,))
    weighted = [DTypeConfig(ACTIVATION, ACTIVATION, weight, torch.float32) for weight in (per_channel, per_tensor)]
    fixed = DTypeWithConstraints(torch.uint8, scale_exact_match=1.0 / 256.0, zero_point_exact_match=0)
    fixed_around_zero = DTypeWithConstraints(torch.uint8, scale_exact_match=2.0 / 256.0, zero_point_exact_match=128)
    unweighted = DTypeConfig(ACTIVATION, ACTIVATION)

    # Where one range for all inputs costs too much: it is taken at run time, or only the weight is quantized.
    weight_only = DTypeConfig(torch.float32, torch.float32, per_channel, torch.float32)
    dynamic = DTypeConfig(ACTIVATION, torch.float32, per_channel, torch.float32, is_dynamic=True)

    config = BackendConfig("qnnpack")
    for operator in op.CONV:
        config.set_backend_pattern_config(BackendPatternConfig(operator).set_dtype_configs([*weighted, weight_only]))
    linear = BackendPatternConfig(op.LINEAR).set_dtype_configs([*weighted, dynamic, weight_only])
    config.set_backend_pattern_config(linear)
    # With scales per channel these kernels read beyond them where there are groups; the 3d one is wrong altogether.
    for operator in op.CONV_TRANSPOSE[:2]:
        config.set_backend_pattern_config(BackendPatternConfig(operator).set_dtype_configs(weighted[1:]))
    for operator in UNWEIGHTED:
        config.set_backend_pattern_config(BackendPatternConfig(operator).add_dtype_config(unweighted))
    for operator in FIXED:
        config.set_backend_pattern_config(
            BackendPatternConfig(operator).add_dtype_config(DTypeConfig(ACTIVATION, fixed))
        )
    tanh = BackendPatternConfig(op.TANH).add_dtype_config(DTypeConfig(ACTIVATION, fixed_around_zero))
    config.set_backend_pattern_config(tanh)
    return config.set_backend_pattern_configs(sharing_patterns(unweighted))
