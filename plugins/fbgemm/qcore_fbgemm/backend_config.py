"""What FBGEMM's kernels accept, as tables."""

import torch
from torch import fx, nn

from qcore.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    Condition,
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
TRANSPOSED = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    *(operator.function for operator in op.CONV_TRANSPOSE),
)

ACTIVATION = DTypeWithConstraints(torch.uint8, qschemes=(QScheme.per_tensor_affine, QScheme.per_tensor_symmetric))


def _is_depthwise(conv: fx.Node) -> bool:
    weight = conv.args[1]
    example = weight.meta.get("example") if isinstance(weight, fx.Node) else None
    return example is not None and example.shape[1] == 1


DEPTHWISE = Condition("depthwise", _is_depthwise)


def backend_config(has_vnni: bool) -> BackendConfig:
    """The patterns that the kernels accept.

    Args:
        has_vnni: whether the CPU has AVX-512 VNNI. Weights per channel are scaled by the backend's own observer where
            pairs of products could saturate; weights of one scale for all must keep to 7 bits there.
    """
    per_channel = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_channel_symmetric,), ch_axis=0)
    per_tensor = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_tensor_symmetric,))
    narrow = DTypeWithConstraints(torch.int8, -64, 64, qschemes=(QScheme.per_tensor_symmetric,))
    wide = per_tensor if has_vnni else narrow
    dense = [DTypeConfig(ACTIVATION, ACTIVATION, weight, torch.float32) for weight in (per_channel, wide)]
    depthwise = [DTypeConfig(ACTIVATION, ACTIVATION, weight, torch.float32) for weight in (per_channel, narrow)]
    fixed = DTypeWithConstraints(torch.uint8, scale_exact_match=1.0 / 256.0, zero_point_exact_match=0)
    fixed_around_zero = DTypeWithConstraints(torch.uint8, scale_exact_match=2.0 / 256.0, zero_point_exact_match=128)
    unweighted = DTypeConfig(ACTIVATION, ACTIVATION)

    # Where one range for all inputs costs too much: it is taken at run time, or only the weight is quantized.
    weight_only = DTypeConfig(torch.float32, torch.float32, per_channel, torch.float32)
    dynamic = DTypeConfig(ACTIVATION, torch.float32, per_channel, torch.float32, is_dynamic=True)

    config = BackendConfig("fbgemm")
    for operator in op.CONV:
        pattern = BackendPatternConfig(operator).set_condition(DEPTHWISE)
        config.set_backend_pattern_config(pattern.set_dtype_configs([*depthwise, weight_only]))
        config.set_backend_pattern_config(BackendPatternConfig(operator).set_dtype_configs([*dense, weight_only]))
    # What nobody reads as integers comes out as float, without a rounding to 8 bits before.
    to_float = [DTypeConfig(ACTIVATION, torch.float32, weight, torch.float32) for weight in (per_channel, wide)]
    linear = BackendPatternConfig(op.LINEAR).set_dtype_configs([*to_float, *dense, dynamic, weight_only])
    config.set_backend_pattern_config(linear)
    # Transposed convolutions take one scale for all weights; which of those their kernels pair is left open, so they
    # keep to 7 bits, and with VNNI those that may count as depthwise.
    for operator in op.CONV_TRANSPOSE:
        pattern = BackendPatternConfig(operator).set_condition(DEPTHWISE)
        config.set_backend_pattern_config(pattern.set_dtype_configs(depthwise[1:]))
        config.set_backend_pattern_config(BackendPatternConfig(operator).set_dtype_configs(dense[1:]))
    for operator in UNWEIGHTED:
        config.set_backend_pattern_config(BackendPatternConfig(operator).add_dtype_config(unweighted))
    for operator in FIXED:
        config.set_backend_pattern_config(
            BackendPatternConfig(operator).add_dtype_config(DTypeConfig(ACTIVATION, fixed))
        )
    tanh = BackendPatternConfig(op.TANH).add_dtype_config(DTypeConfig(ACTIVATION, fixed_around_zero))
    config.set_backend_pattern_config(tanh)
    return config.set_backend_pattern_configs(sharing_patterns(unweighted))
