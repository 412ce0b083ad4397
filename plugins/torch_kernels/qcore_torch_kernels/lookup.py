"""A kernel for functions of single 8-bit values: a table of their 256 results, whatever they cost to compute."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qcore_torch_kernels.kernel import KernelModule

#: From how many elements two at a time are looked up faster than one, measured.
_WORTH_PAIRING = 2**14


class LookupKernel(KernelModule):
    """Any function of single values, by a table of its results.

    Args:
        table: the result's integer for each integer, uint8 (256,).
        function: its name.

    Attributes:
        piece: elements that are looked up in one call, in the calling thread if they are few; ``None`` for all.
    """

    table: Tensor
    piece: int | None = None

    def __init__(self, table: Tensor, function: str) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.kernel_name = f"{function} by table"

    def pack(self) -> Callable[[Tensor], Tensor]:
        """The function of uint8 tensors with its tables bound; the result has the layout of the input."""
        single, most = self.table, self.piece
        # Two neighbouring bytes at once, read as one index in the machine's own byte order, take half the time.
        of_index = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).to(torch.int64)
        double = single[of_index].view(torch.int16)

        def run(x: Tensor) -> Tensor:
            if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
                x = x.contiguous()
            flat = x.as_strided((x.numel(),), (1,))
            if x.numel() < _WORTH_PAIRING or x.numel() % 2 or x.storage_offset() % 2:
                return _looked_up(single, flat, most).as_strided(x.shape, x.stride())
            pairs = _looked_up(double, flat.view(torch.uint16), most)
            return pairs.view(torch.uint8).as_strided(x.shape, x.stride())

        return run


def _looked_up(table: Tensor, index: Tensor, most: int | None) -> Tensor:
    found = [table.index_select(0, piece.to(torch.int32)) for piece in _pieces(index, most)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _pieces(row: Tensor, most: int | None) -> Iterator[Tensor]:
    if most is None or row.numel() <= most:
        yield row
    else:
        for start in range(0, row.numel(), most):
            yield row.narrow(0, start, min(most, row.numel() - start))
