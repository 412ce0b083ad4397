"""The conformance suite for backends on this library: what the core's holds, and that calls are replayed."""

from typing import ClassVar

from torch import nn

from qcore.fx.graph_module import QGraphModule
from qcore.testing import BackendConformance
from qcore_torch_kernels.graph import replayed_kinds


class TorchKernelsConformance(BackendConformance):
    """Subclass it in a test module and name the backend.

    Attributes:
        replays: whether all kernels are ``replayable``, so that recordings stand for calls.
    """

    replays: ClassVar[bool] = True

    def check_after_calls(self, converted: nn.Module) -> None:
        """From the third call of a kind on, a recording is replayed."""
        assert isinstance(converted, QGraphModule)
        assert replayed_kinds(converted) == int(self.replays)
