"""How much of a network is stored as integers, counted alike for every contender."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def int8_share(model: nn.Module, converted: nn.Module) -> float:
    """Share of the float model's weights that the converted model stores as int8, 0..1."""
    return min(1.0, int8_weights(converted) / max(1, float_weights(model)))


def float_weights(model: nn.Module) -> int:
    """Elements in the weights of all convolutions, linear and recurrent layers and attention projections, once each."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        elif isinstance(module, nn.RNNBase):
            names = [name for name, _ in module.named_parameters() if name.startswith("weight")]
        elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or type(module).__name__ == "Conv1D":
            names = ["weight"]
        else:
            continue
        parts: list[Tensor | None] = [getattr(module, name) for name in names]
        found |= {id(part): part.numel() for part in parts if part is not None}
    return sum(found.values())


def _stored(value: Any) -> Iterator[Tensor]:
    # torch.ao keeps weights as quantized tensors, in tuples, or in packed objects that can be unpacked.
    if isinstance(value, Tensor):
        yield value.int_repr() if value.is_quantized else value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _stored(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _stored(item)
    elif hasattr(value, "unpack"):
        yield from _stored(value.unpack())
    elif isinstance(value, torch.ScriptObject) and hasattr(value, "__getstate__"):
        yield from _stored(value.__getstate__())


def int8_weights(model: nn.Module) -> int:
    """Elements of all int8 tensors called a weight in the state_dict; embeddings left out, equal ones counted once.

    A layer that is called twice may be stored twice, which must not count twice.
    """
    found: dict[tuple[Any, ...], int] = {}
    for name, value in model.state_dict().items():
        if not re.search("weight|packed", name) or "embed" in name:
            continue
        for tensor in _stored(value):
            if tensor.dtype == torch.int8 and tensor.ndim > 1:
                content = hashlib.blake2b(tensor.contiguous().numpy().tobytes()).hexdigest()
                found[(tuple(tensor.shape), content)] = tensor.numel()
    return sum(found.values())
