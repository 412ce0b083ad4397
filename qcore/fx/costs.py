"""What an operator costs: multiply-adds on the example inputs, and weights."""

import math

from torch import fx, nn

from qcore.fx.graph_module import get_attribute, submodule
from qcore.fx.operators import CONV, CONV_TRANSPOSE, LINEAR, MATMUL, operator_of
from qcore.fx.shapes import Example


def multiply_adds(node: fx.Node, root: nn.Module) -> int:
    """Multiplications with an addition that a node makes on the example inputs; 0 for all but products.

    Args:
        node: a call.
        root: holds its module.
    """
    if node.op == "call_module":
        module, given = submodule(root, str(node.target)), _example(next(iter(node.args), None))
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or given is None:
            return 0
        return math.prod(given.shape[:-1]) * module_weights(module)  # Each weight once at every step.
    op, result = operator_of(node), _example(node)
    if op is None or result is None:
        return 0
    operands = [_example(argument) for argument in node.args[:2]]
    left, right = (*operands, None, None)[:2]
    if left is None or right is None:
        return 0
    if op in CONV:
        return math.prod(result.shape) * math.prod(right.shape[1:])
    if op in CONV_TRANSPOSE:
        return math.prod(left.shape) * math.prod(right.shape[1:])
    if op in (LINEAR, MATMUL):
        return math.prod(result.shape) * left.shape[-1]
    return 0


def weight_count(node: fx.Node, root: nn.Module) -> int:
    """Numbers in the weights of a node; 0 if it has none.

    Args:
        node: a call; one that is no operator of qcore's, such as a leaf module, has as weights what it reads of
            parameters with two dimensions or more.
        root: holds its module or its parameters.
    """
    op = operator_of(node)
    if op is not None:
        weight = None if op.weight is None else _example(node.args[op.weight])
        return 0 if weight is None else math.prod(weight.shape)
    if node.op == "call_module":
        return module_weights(submodule(root, str(node.target)))
    if all(source.op == "get_attr" for source in node.all_input_nodes):
        return 0  # Computed from weights: that is counted where the result is read.
    read = [get_attribute(root, str(source.target)) for source in node.all_input_nodes if source.op == "get_attr"]
    return sum(value.numel() for value in read if isinstance(value, nn.Parameter) and value.dim() > 1)


def module_weights(module: nn.Module, recurse: bool = True) -> int:
    """Numbers in a module's parameters of two dimensions or more."""
    return sum(parameter.numel() for parameter in module.parameters(recurse) if parameter.dim() > 1)


def _example(node: object) -> Example | None:
    found = node.meta.get("example") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Example) else None
