"""What this backend promises beyond the core's conformance suite."""

from qcore_torch_kernels.testing import EngineSuite, KernelSuite


class TestKernels(EngineSuite):
    backend = "fbgemm"
    left_float = KernelSuite.left_float | {"conv_transpose2d 2x2 of 8 channels"}
    linear = "linear, to float"
