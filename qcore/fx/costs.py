"""What an operator costs: multiply-adds on the example inputs, and weights."""

import math

from torch import fx

from qcore.fx.operators import CONV, CONV_TRANSPOSE, LINEAR, MATMUL, operator_of
from qcore.fx.shapes import Example


def multiply_adds(node: fx.Node) -> int:
    """Multiplications with an addition that a node's operator makes on the example inputs; 0 for all but products."""
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


def weight_count(node: fx.Node) -> int:
    """Numbers in the weight of a node's operator; 0 if it has none."""
    op = operator_of(node)
    weight = None if op is None or op.weight is None else _example(node.args[op.weight])
    return 0 if weight is None else math.prod(weight.shape)


def _example(node: object) -> Example | None:
    found = node.meta.get("example") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Example) else None
