"""What is done to integers as they are, plain or in quantized tensors; the result keeps the input's qparams."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from qcore.lowering import QParams
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.shells import bounded, on_integers


class QClamp(KernelModule):
    """A clamp.

    Args:
        output: qparams of input and result, with the bounds as their clamp.
    """

    kernel_name = "clamp on integers"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self.add_qparams("output", output)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's clamp of quantized tensors depends on the engine, and is wrong for channels_last in one of them."""
        low, high = self.bounds("output") or (0, 255)
        return on_integers(lambda x: x.clamp(low, high))


class QPad(KernelModule):
    """Padding, by the integer that stands for zero or by the input's own values.

    Args:
        input: qparams of the input, which are the result's, too.
        sizes: as ``F.pad`` takes them, with nodes for those that the graph computes.
        mode: as ``F.pad`` takes it.
        computed: those nodes, in the order in which their values come after the input.
    """

    kernel_name = "pad on integers"

    def __init__(
        self, input: QParams, sizes: Sequence[Any], mode: str = "constant", computed: Sequence[fx.Node] = ()
    ) -> None:
        super().__init__()
        self.add_qparams("input", input)
        self.sizes = tuple(None if size in computed else size for size in sizes)
        self.order = tuple(computed.index(size) for size in sizes if size in computed)
        self.mode = mode

    def pack(self) -> Callable[..., Tensor]:
        """Many times faster than torch's padding of quantized tensors."""
        sizes, order, mode = self.sizes, self.order, self.mode
        # Only a constant may be given a value; elsewhere F.pad repeats what is there.
        value = self.qparams("input")[1] if mode == "constant" else None

        def run(x: Tensor, *given: int) -> Tensor:
            remaining = iter([given[place] for place in order])
            return F.pad(x, [next(remaining) if size is None else size for size in sizes], mode, value)

        return on_integers(run)


class QJoin(KernelModule):
    """A concatenation or a stack of integers that mean the same.

    Args:
        function: ``torch.cat`` or ``torch.stack``.
        dim: along which.
        output: qparams of the inputs and the result.
    """

    kernel_name = "joined integers"

    def __init__(self, function: Callable[..., Tensor], dim: int, output: QParams) -> None:
        super().__init__()
        self.function, self.dim = function, dim
        self.add_qparams("output", output)

    def pack(self) -> Callable[..., Tensor]:
        """Torch's own."""
        function, dim = self.function, self.dim
        return bounded(on_integers(lambda *inputs: function(inputs, dim)), self.bounds("output"))


class QNearest(KernelModule):
    """Interpolation that only repeats or drops elements.

    Args:
        size: of the result.
        scale_factor: if there is no size.
        mode: ``"nearest"`` or ``"nearest-exact"``.
    """

    kernel_name = "interpolate on integers"

    def __init__(self, size: Any, scale_factor: Any, mode: str) -> None:
        super().__init__()
        self.arguments = (size, scale_factor, mode)

    def pack(self) -> Callable[[Tensor], Tensor]:
        """Torch's own."""
        arguments = self.arguments
        return on_integers(lambda x: F.interpolate(x, *arguments))
