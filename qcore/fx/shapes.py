"""Runs the traced model once on the example inputs and notes the shape and dtype of every value."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qcore.errors import ExampleInputsError


@dataclass(frozen=True)
class Example:
    """What one tensor looked like in that run.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["example"] = Example(tuple(value.shape), value.dtype)
        return value


def propagate_examples(traced: fx.GraphModule, model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Write ``meta["example"]`` on every node of ``traced`` whose value is a tensor.

    Args:
        traced: the traced model.
        model: the model that it came from, for the message.
        example_inputs: positional arguments of the model's forward.

    Raises:
        ExampleInputsError: the model doesn't run on them.
    """
    expected = [node for node in traced.graph.nodes if node.op == "placeholder"]
    required = sum(1 for node in expected if not node.args)
    described = ", ".join(_describe(value) for value in example_inputs)
    if not required <= len(example_inputs) <= len(expected):
        raise ExampleInputsError(
            f"{type(model).__name__} takes {len(expected)} inputs ({', '.join(node.name for node in expected)}), "
            f"example_inputs holds {len(example_inputs)}: ({described}). Give a tuple of what forward takes"
        )
    try:
        with torch.no_grad():
            _Recorder(traced).run(*example_inputs)
    except Exception as error:
        raise ExampleInputsError(
            f"{type(model).__name__} doesn't run on example_inputs=({described}): {str(error).splitlines()[0]}. "
            "Give inputs on which model(*example_inputs) runs"
        ) from error


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def is_floating_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of any float dtype."""
    example = node.meta.get("example")
    return example is not None and bool(example.dtype.is_floating_point)


def is_float_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a float32 tensor."""
    example = node.meta.get("example")
    return example is not None and example.dtype == torch.float32
