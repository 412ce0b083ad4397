"""What QNNPACK's kernels accept, as tables."""

from qcore_torch_kernels import configs
from qcore_torch_kernels.configs import PER_CHANNEL, PER_TENSOR, pattern, weighted

from qcore.backend_config import BackendConfig
from qcore.fx import operators as op


def backend_config() -> BackendConfig:
    """The patterns that the kernels accept, on any CPU."""
    dense = weighted((PER_CHANNEL, PER_TENSOR))
    return BackendConfig("qnnpack").set_backend_pattern_configs(
        [
            *(pattern(conv, [*dense, configs.WEIGHT_ONLY]) for conv in op.CONV),
            pattern(op.LINEAR, [*dense, configs.DYNAMIC, configs.WEIGHT_ONLY]),
            # With scales per channel these kernels read beyond them where there are groups; the 3d one is wrong
            # altogether.
            *(pattern(conv, dense[1:]) for conv in op.CONV_TRANSPOSE[:2]),
            *configs.unweighted_patterns(),
        ]
    )
