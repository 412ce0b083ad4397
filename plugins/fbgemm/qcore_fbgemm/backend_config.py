"""What FBGEMM's kernels accept, as tables."""

import torch
from qcore_torch_kernels import configs
from qcore_torch_kernels.configs import DEPTHWISE, PER_CHANNEL, PER_TENSOR, PER_TENSOR_NARROW, pattern, weighted

from qcore.backend_config import BackendConfig
from qcore.fx import operators as op


def backend_config(has_vnni: bool) -> BackendConfig:
    """The patterns that the kernels accept.

    Args:
        has_vnni: whether the CPU has AVX-512 VNNI. Weights per channel are scaled by the backend's own observer where
            pairs of products could saturate; weights of one scale for all must keep to 7 bits there.
    """
    wide = PER_TENSOR if has_vnni else PER_TENSOR_NARROW
    # What nobody reads as integers comes out as float, without a rounding to 8 bits before.
    to_float, dense = weighted((PER_CHANNEL, wide), torch.float32), weighted((PER_CHANNEL, wide))
    depthwise = weighted((PER_CHANNEL, PER_TENSOR_NARROW))
    patterns = [pattern(op.LINEAR, [*to_float, *dense, configs.DYNAMIC, configs.WEIGHT_ONLY])]
    for conv in op.CONV:
        patterns.append(pattern(conv, [*depthwise, configs.WEIGHT_ONLY], DEPTHWISE))
        patterns.append(pattern(conv, [*dense, configs.WEIGHT_ONLY]))
    # Transposed convolutions take one scale for all weights; which of those their kernels pair is left open, so they
    # keep to 7 bits, and with VNNI those that may count as depthwise.
    for conv in op.CONV_TRANSPOSE:
        patterns += [pattern(conv, depthwise[1:], DEPTHWISE), pattern(conv, dense[1:])]
    return BackendConfig("fbgemm").set_backend_pattern_configs([*patterns, *configs.unweighted_patterns()])
