"""What is packed for the shape of a kernel's input."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from qcore_torch_kernels.kernel import PACKING
from torch import Tensor

#: For how many input shapes a weight is packed; a further one shares the first one's of its kind.
MAX_SHAPES = 4


def by_shape(
    pack: Callable[[torch.Size], Any], kind: Callable[[torch.Size], Hashable] = lambda shape: None
) -> Callable[[Tensor], Any]:
    """What ``pack`` gives for an input's shape.

    For other shapes oneDNN may prefer other layouts, and a call that meets the wrong one reorders the whole weight.

    Args:
        pack: gives what the kernel takes for a shape.
        kind: that on which the bits of a result depend, such as the engine. What was packed for one kind never stands
            for another, so that a call gives the same whatever shapes came before.
    """
    packed: dict[torch.Size, Any] = {}
    first: dict[Hashable, Any] = {}
    kind = functools.lru_cache(maxsize=64)(kind)

    def known(shape: torch.Size) -> Any:
        found = packed.get(shape)
        return first.get(kind(shape)) if found is None and len(packed) >= MAX_SHAPES else found

    def of(x: Tensor) -> Any:
        found = known(x.shape)
        if found is None:
            with PACKING:  # Threads that come together pack no shape twice, and no more shapes.
                found = known(x.shape)
                if found is None:
                    found = pack(x.shape)
                    first.setdefault(kind(x.shape), found)
                    if len(packed) < MAX_SHAPES:
                        packed[x.shape] = found
        return found

    return of
