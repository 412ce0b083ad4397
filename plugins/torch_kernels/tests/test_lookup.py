"""Functions by a table of their results."""

import pytest
import torch
from qcore_torch_kernels.lookup import LookupKernel
from torch import Tensor


class InPieces(LookupKernel):
    """At most 8 at a time."""

    piece = 8


def inputs() -> dict[str, Tensor]:
    many = torch.randint(0, 256, (1, 8, 64, 64), dtype=torch.uint8)
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return {
        "every value": every,
        "one": every[:1],
        "none": every[:0],
        "odd number": every[:255],
        "odd place": every[1:],
        "gaps": every[::3],
        "images": many,
        "images, channels last": many.contiguous(memory_format=torch.channels_last),
        "images, odd place": many.flatten()[1:-1].view(1, 2, 3, -1),
        "transposed": many.transpose(2, 3),
    }


@pytest.mark.parametrize("kind", [LookupKernel, InPieces])
@pytest.mark.parametrize("name", inputs())
def test_each_value_is_looked_up(name: str, kind: type[LookupKernel]) -> None:
    table = torch.randint(0, 256, (256,), dtype=torch.uint8)
    x = inputs()[name]
    found = kind(table, "f")(x)
    assert torch.equal(found, table[x.long()])
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        assert found.stride() == x.stride()


def test_the_name_says_which_function() -> None:
    assert LookupKernel(torch.zeros(256, dtype=torch.uint8), "sigmoid").kernel_name == "sigmoid by table"
