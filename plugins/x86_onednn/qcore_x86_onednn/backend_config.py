"""What oneDNN's kernels accept, as tables."""

import torch
from qcore_torch_kernels import configs
from qcore_torch_kernels.configs import PER_CHANNEL, PER_TENSOR, PER_TENSOR_NARROW, UNIT_RANGE, pattern, weighted
from torch import fx

from qcore.backend_config import BackendConfig, Condition
from qcore.fx import operators as op

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
    weights = (PER_CHANNEL, PER_TENSOR_NARROW if pairs_saturate else PER_TENSOR)
    # What nobody reads as integers comes out as float, without a rounding to 8 bits before.
    to_integers = weighted(weights)
    dense = [*weighted(weights, torch.float32), *to_integers]
    return BackendConfig("x86_onednn").set_backend_pattern_configs(
        [
            # The residual's kernel writes over the residual, which is uint8.
            pattern((op.CONV[1], op.ADD), to_integers, Condition("same shape", _same_shape)),
            *(pattern(conv, [*dense, configs.WEIGHT_ONLY]) for conv in op.CONV),
            pattern(op.LINEAR, [*dense, configs.DYNAMIC, configs.WEIGHT_ONLY]),
            *(pattern(chain, dense) for chain in FUSED_ACTIVATIONS),
            *(pattern(chain, weighted(weights, UNIT_RANGE)) for chain in FUSED_FIXED),
            *configs.unweighted_patterns((op.SILU, op.GELU), (op.SOFTMAX,)),
        ]
    )
