"""What an operator costs: multiply-adds on the example inputs, and weights."""

import math

from torch import fx, nn

from qcore.fx.graph_module import get_attribute, submodule
from qcore.fx.operators import CONV, CONV_TRANSPOSE, LINEAR, MATMUL, RNN_CELLS, operator_of
from qcore.fx.shapes import Example


def multiply_adds(node: fx.Node, root: nn.Module) -> int:
    """Multiplications with an addition that a node makes on the example inputs; 0 for all but products.

    Args:
        node: a call.
        root: holds its module.
    """
    given = _example(next(iter(node.args), None))
    if given is None:
        return 0
    if node.op == "call_module":
        module = submodule(root, str(node.target))
        is_recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        return math.prod(given.shape[:-1]) * module_weights(module) if is_recurrent else 0
    op, result = operator_of(node), _example(node)
    if op is None or result is None:
        return 0
    if op in (LINEAR, *RNN_CELLS):
        return math.prod(given.shape[:-1]) * weight_count(node, root)
    other = _example(node.args[1]) if op in (*CONV, *CONV_TRANSPOSE, MATMUL) else None
    if other is None:
        return 0
    if op is MATMUL:
        return math.prod(result.shape) * given.shape[-1]
    return math.prod((given if op in CONV_TRANSPOSE else result).shape) * math.prod(other.shape[1:])


def weight_count(node: fx.Node, root: nn.Module) -> int:
    """Numbers in the weights of a node; 0 if it has none.

    Args:
        node: a call; one that is no operator of qcore's, such as a leaf module, has as weights what it reads of
            parameters with two dimensions or more.
        root: holds its module or its parameters.
    """
    op = operator_of(node)
    if op is not None:
        weights = [_example(node.args[position]) for position in op.weights]
        return sum(math.prod(weight.shape) for weight in weights if weight is not None)
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
