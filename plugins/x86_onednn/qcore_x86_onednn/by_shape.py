"""What is packed for the shape of a kernel's input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore.kernel import PACKING

#: For how many input shapes a weight is packed; further ones share the first one's.
MAX_SHAPES = 4


def by_shape(pack: Callable[[torch.Size], Any]) -> Callable[[Tensor], Any]:
    """What ``pack`` gives for an input's shape.

    For other shapes oneDNN may prefer other layouts, and a call that meets the wrong one reorders the whole weight.
    """
    packed: dict[torch.Size, Any] = {}

    def of(x: Tensor) -> Any:
        if x.shape not in packed and len(packed) < MAX_SHAPES:
            with PACKING:  # Threads that come together pack no shape twice, and no more shapes.
                if x.shape not in packed and len(packed) < MAX_SHAPES:
                    packed[x.shape] = pack(x.shape)
        return packed[x.shape] if x.shape in packed else next(iter(packed.values()))

    return of
