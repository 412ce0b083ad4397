"""What oneDNN's kernels accept, as tables."""

import torch
from torch import fx

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

#: An activation that the convolution or linear kernel before it computes itself.
FUSED_ACTIVATIONS = (
    (op.CONV[1], op.HARDSWISH),
    (op.CONV[1], op.SILU),
    (op.LINEAR, op.HARDSWISH),
    (op.LINEAR, op.SILU),
    (op.LINEAR, op.GELU),
    (op.LINEAR, op.LEAKY_RELU),
    (op.LINEAR, op.TANH),
)

#: The same, where it must have the fixed range of its own.
FUSED_FIXED = ((op.CONV[1], op.HARDSIGMOID), (op.LINEAR, op.HARDSIGMOID))

#: Operators with an output of their own scale.
UNWEIGHTED = (
    op.ADD, op.MUL, *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL, op.MEAN, op.HARDSWISH, op.LEAKY_RELU, op.ELU, op.SILU, op.GELU,
    op.INTERPOLATE,
)  # fmt: skip

#: Operators whose output lies in 0..1.
FIXED = (op.SIGMOID, op.HARDSIGMOID, op.SOFTMAX)

ACTIVATION = DTypeWithConstraints(torch.uint8, qschemes=(QScheme.per_tensor_affine, QScheme.per_tensor_symmetric))


def _same_shape(conv: fx.Node) -> bool:
    """Whether a convolution is added to something of its own shape: the kernel can't broadcast."""
    (add,) = conv.users
    shapes = {source.meta["example"].shape for source in op.activation_inputs(add) if "example" in source.meta}
    return len(shapes) == 1


def backend_config(pairs_saturate: bool) -> BackendConfig:
    """The patterns that the kernels accept.

    Args:
        pairs_saturate: whether this CPU adds pairs of products in 16 bits. Then weights per channel are scaled by the
            backend's own observer; weights of one scale for all must keep to 7 bits.
    """
    per_channel = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_channel_symmetric,), ch_axis=0)
    low, high = (-64, 64) if pairs_saturate else (None, None)
    per_tensor = DTypeWithConstraints(torch.int8, low, high, qschemes=(QScheme.per_tensor_symmetric,))
    # What nobody reads as integers comes out as float, without a rounding to 8 bits before.
    weighted = [
        DTypeConfig(ACTIVATION, output, weight, torch.float32)
        for output in (torch.float32, ACTIVATION)
        for weight in (per_channel, per_tensor)
    ]
    fixed = DTypeWithConstraints(torch.uint8, scale_exact_match=1.0 / 256.0, zero_point_exact_match=0)
    fixed_around_zero = DTypeWithConstraints(torch.uint8, scale_exact_match=2.0 / 256.0, zero_point_exact_match=128)
    unweighted = DTypeConfig(ACTIVATION, ACTIVATION)

    # Where one range for all inputs costs too much: it is taken at run time, or only the weight is quantized.
    weight_only = DTypeConfig(torch.float32, torch.float32, per_channel, torch.float32)
    dynamic = DTypeConfig(ACTIVATION, torch.float32, per_channel, torch.float32, is_dynamic=True)

    config = BackendConfig("x86_onednn")
    residual = BackendPatternConfig((op.CONV[1], op.ADD)).set_condition(Condition("same shape", _same_shape))
    # The residual's kernel writes over the residual, which is uint8.
    config.set_backend_pattern_config(residual.set_dtype_configs(weighted[2:]))
    for pattern in (*op.CONV, *FUSED_ACTIVATIONS):
        own = [] if isinstance(pattern, tuple) else [weight_only]
        config.set_backend_pattern_config(BackendPatternConfig(pattern).set_dtype_configs([*weighted, *own]))
    linear = BackendPatternConfig(op.LINEAR).set_dtype_configs([*weighted, dynamic, weight_only])
    config.set_backend_pattern_config(linear)
    weighted_fixed = [DTypeConfig(ACTIVATION, fixed, weight, torch.float32) for weight in (per_channel, per_tensor)]
    for pattern in FUSED_FIXED:
        config.set_backend_pattern_config(BackendPatternConfig(pattern).set_dtype_configs(weighted_fixed))
    for pattern in UNWEIGHTED:
        config.set_backend_pattern_config(BackendPatternConfig(pattern).add_dtype_config(unweighted))
    for pattern in FIXED:
        config.set_backend_pattern_config(
            BackendPatternConfig(pattern).add_dtype_config(DTypeConfig(ACTIVATION, fixed))
        )
    tanh = BackendPatternConfig(op.TANH).add_dtype_config(DTypeConfig(ACTIVATION, fixed_around_zero))
    config.set_backend_pattern_config(tanh)
    return config.set_backend_pattern_configs(sharing_patterns(unweighted))
