"""Runs: the float model on the example inputs, and a traced graph on the same, to prove that it computes the same.

The second run also notes the shape and dtype of every value, on which the plan rests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qcore.errors import ExampleInputsError, TraceError
from qcore.fx.graph_module import computed
from qcore.fx.inplace import write_back
from qcore.fx.signature import SignatureCodeGen


@dataclass(frozen=True)
class Example:
    """What one tensor looked like in that run.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Example":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def run_model(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The float model's own result on (copies of) the example inputs.

    Raises:
        ExampleInputsError: it doesn't run on them; the model's own error is chained.
    """
    try:
        with torch.no_grad():
            return model(*copied(args), **copied(kwargs))
    except Exception as error:
        given = [*(_describe(value) for value in args), *(f"{name}={_describe(v)}" for name, v in kwargs.items())]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExampleInputsError(
            f"{type(model).__name__} doesn't run on example_inputs=({', '.join(given)}): {reason}. "
            "Give inputs on which model(*example_inputs) runs"
        ) from error


def propagate_examples(traced: fx.GraphModule, tensors: Sequence[Tensor], *, notes: bool = True) -> Any:
    """Run a graph on copies of ``tensors``, write ``meta["example"]`` on every node that gives a tensor.

    Args:
        traced: the graph.
        tensors: its inputs.
        notes: whether to write that; not at a call that isn't the one that was traced.

    Returns:
        What the module's forward would return.

    Raises:
        TraceError: a node of the graph writes into what it is given, of which other nodes know nothing.
    """
    nodes = list(traced.graph.nodes)
    last_reader = {source: node for node in nodes for source in node.all_input_nodes}
    done_after: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in last_reader.items():
        done_after.setdefault(reader, []).append(source)
    values: dict[fx.Node, Any] = {}
    versions: dict[fx.Node, int] = {}  # How often each was written when it was made.
    given = iter(copied(tensors))
    outputs: Any = None
    # A loop of our own: fx.Interpreter takes longer than most operators for what it notes at each node.
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                outputs = args[0]
                for source in node.all_input_nodes:
                    _check_unwritten(source, values[source], versions)
                break
            value = next(given) if node.op == "placeholder" else computed(node, args, kwargs, traced)
            values[node] = value
            if isinstance(value, Tensor):
                example = Example.of(value)
                if notes:
                    node.meta["example"] = example
                if node.meta.pop("overwrites", False) and example != Example.of(args[0]):
                    raise _trace_error(f"{node.name} is written into a tensor of another dtype or shape")
                if not value.is_inference():
                    versions[node] = value._version
            elif notes:
                node.meta.pop("example", None)
            for source in done_after.get(node, ()):
                if not _may_write(node, source):
                    _check_unwritten(source, values[source], versions)
                del values[source]
    codegen = traced.graph._codegen
    return codegen.process_outputs(outputs) if isinstance(codegen, SignatureCodeGen) else _mutable(outputs)


def _mutable(outputs: Any) -> Any:
    """What a graph's code makes of the containers among its outputs: an fx graph holds lists that can't change."""
    if isinstance(outputs, dict):
        return {name: _mutable(value) for name, value in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        kind = list if isinstance(outputs, list) else tuple
        return kind(_mutable(value) for value in outputs)
    return outputs


def _check_unwritten(node: fx.Node, value: Any, versions: dict[fx.Node, int]) -> None:
    if node in versions and versions[node] != value._version:
        raise _trace_error(f"what {node.name} gives is written, in a way that qcore doesn't know")


def _may_write(reader: fx.Node, source: fx.Node) -> bool:
    """Whether it is known that the last reader of a value writes into it: an input at the end, a copy for its own."""
    return reader.target is write_back or (source.target == "clone" and len(source.users) == 1)


def _trace_error(reason: str) -> TraceError:
    return TraceError(reason, "", None, reason)


def difference(expected: Any, found: Any) -> str:
    """How two results differ; empty if they are the same to the last bit."""
    wanted, spec = pytree.tree_flatten(expected)
    given, other = pytree.tree_flatten(found)
    if spec != other:
        return "its result is built otherwise"
    for want, have in zip(wanted, given, strict=True):
        if isinstance(want, Tensor) and isinstance(have, Tensor):
            if want.shape != have.shape or want.dtype != have.dtype:
                return f"it gives {_describe(have)} where the module gives {_describe(want)}"
            if not torch.equal(want, have) and not _equal_with_nan(want, have):
                return "it gives other values than the module"
        elif want is not have and (type(want) is not type(have) or not _is_same(want, have)):
            return f"it gives {have!r} where the module gives {want!r}"
    return ""


def _is_same(want: Any, have: Any) -> bool:
    """Whether two objects of a type are the same; those that say of no other that it is, by what they hold."""
    if getattr(type(want), "__eq__", None) is not object.__eq__ or not hasattr(want, "__dict__"):
        return bool(want == have)
    return not difference(vars(want), vars(have))


def _equal_with_nan(want: Tensor, have: Tensor) -> bool:
    return want.is_floating_point() and bool(torch.allclose(want, have, rtol=0, atol=0, equal_nan=True))


def copied(values: Any) -> Any:
    """The values with every tensor among them copied, so that a forward may write into them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(Example.of(value))
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    return type(value).__name__


def is_floating_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of any float dtype."""
    example = node.meta.get("example")
    return example is not None and bool(example.dtype.is_floating_point)


def is_float_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a float32 tensor."""
    example = node.meta.get("example")
    return example is not None and example.dtype == torch.float32
