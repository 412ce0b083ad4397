"""The pass before planning: rewrites that make fewer operators of several, exactly. The patterns come from the backend.

A :class:`FusionPattern` is data: a chain of operators and the function that rewrites it. Folding a batch norm into the
convolution or linear before it is the one that every backend shares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore.backend_config import Pattern
from qcore.errors import PluginError
from qcore.fx.graph_module import QGraphModule, delete_tensor, get_attribute, set_tensor, submodule
from qcore.fx.match import PatternTable
from qcore.fx.names import free_target, is_free
from qcore.fx.nodes import new_node
from qcore.fx.operators import BATCH_NORM, CONV, CONV_TRANSPOSE, LINEAR, operator_of
from qcore.fx.shapes import Example
from qcore.fx.signature import check_size


@dataclass(frozen=True)
class FusionPattern:
    """A chain of operators, and how to make fewer of them.

    Attributes:
        pattern: an operator, or a tuple of operators, each the only reader of the one before it.
        rewrite: gets the module and the chain's nodes; changes the module's graph and tensors so that it computes the
            same, and returns whether it did (``False`` leaves the chain as it was). Nodes that stay keep the shape and
            the dtype of what they give.
        needs_run: whether a run of the network on the example inputs has to show that it computes the same.
    """

    pattern: Pattern
    rewrite: Callable[[QGraphModule, Sequence[fx.Node]], bool]
    needs_run: bool = True

    def apply(self, module: QGraphModule, chain: Sequence[fx.Node]) -> bool:
        """Rewrite a chain, and return whether that was done.

        Raises:
            PluginError: the rewrite fails, or doesn't say whether it did; its own error is chained.
        """
        where = f"the rewrite of the fusion pattern {self.pattern!r} at node {chain[0].name!r}"
        try:
            done = self.rewrite(module, chain)
        except Exception as error:
            message = f"{where} failed: {type(error).__name__}: {error}"
            raise PluginError(message, hook="qcore_fusion_patterns") from error
        if not isinstance(done, bool):
            raise PluginError(f"{where} returned {done!r}, neither True nor False", hook="qcore_fusion_patterns")
        return done


def fuse(module: QGraphModule, patterns: Sequence[FusionPattern]) -> QGraphModule:
    """Apply every pattern wherever it fits; changes and returns ``module``; see :func:`apply_patterns`."""
    apply_patterns(module, patterns)
    return module


def apply_patterns(module: QGraphModule, patterns: Sequence[FusionPattern]) -> bool:
    """Apply every pattern wherever it fits, longest first, in one walk.

    Args:
        module: in normal form; it must be one of qcore's own copies, and is changed.
        patterns: of the backend.

    Returns:
        Whether any was applied that needs a run.
    """
    needs_run = False
    table = PatternTable((pattern.pattern, pattern) for pattern in patterns)
    module_types: dict[str, type[nn.Module]] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module_types[str(node.target)] = type(submodule(module, str(node.target)))
        for chain, pattern in table.chains(node, module_types):
            if pattern.apply(module, chain):
                needs_run |= pattern.needs_run
                break
    return needs_run


def fold_batch_norm(module: QGraphModule, chain: Sequence[fx.Node]) -> bool:
    """Fold an evaluation-mode batch norm into the weight and bias of the operator before it.

    The arithmetic and its order are those of ``torch.nn.utils.fusion.fuse_conv_bn_weights``, so that the folded weights
    are the same to the last bit. Whether it may be done is asked of the graph alone, so a run would show nothing more.
    """
    weighted, norm = chain
    op = operator_of(weighted)
    assert op is not None and op.weight is not None and op.bias is not None
    training = norm.args[5]
    parameters = [weighted.args[op.weight], weighted.args[op.bias], *norm.args[1:5]]
    present = [value for value in parameters if value is not None]
    if training or not all(isinstance(value, fx.Node) and value.op == "get_attr" for value in present):
        return False
    tensors = [None if v is None else get_attribute(module, str(v.target)) for v in parameters]  # type: ignore[union-attr]
    weight: Tensor = tensors[0]  # type: ignore[assignment]
    bias, mean, var, gamma, beta = tensors[1:]
    if mean is None or var is None or not _normalizes_channels(module, weighted, norm):
        return False
    groups = int(weighted.args[6]) if op in CONV_TRANSPOSE else 1  # type: ignore[arg-type]
    with torch.no_grad():
        rsqrt = torch.rsqrt(var + norm.args[7])
        factor = rsqrt if gamma is None else gamma * rsqrt
        folded_weight = weight * _per_output_channel(factor, weight, op in CONV_TRANSPOSE, groups)
        folded_bias = (-mean if bias is None else bias - mean) * rsqrt
        folded_bias = folded_bias if gamma is None else folded_bias * gamma
        folded_bias = folded_bias if beta is None else folded_bias + beta
    weight_node = parameters[0]
    assert isinstance(weight_node, fx.Node)
    new_weight = _replaced(module, weighted, weight_node, str(weight_node.target), folded_weight)
    owner = str(weight_node.target).rpartition(".")[0]
    bias_node = parameters[1]
    bias_target = str(bias_node.target) if isinstance(bias_node, fx.Node) else f"{owner}.bias" if owner else "bias"
    new_bias = _replaced(module, weighted, bias_node, bias_target, folded_bias)
    args = list(weighted.args)
    args[op.weight], args[op.bias] = new_weight, new_bias
    weighted.args = tuple(args)
    norm.replace_all_uses_with(weighted)
    weighted.meta["folded"] = (*weighted.meta.get("folded", ()), *filter(None, [norm.meta.get("origin")]))
    module.graph.erase_node(norm)
    for node in dict.fromkeys(present):
        assert isinstance(node, fx.Node)
        if not node.users:
            module.graph.erase_node(node)
            if node.target not in (new_weight.target, new_bias.target):
                delete_tensor(module, str(node.target))
    return True


def _normalizes_channels(module: QGraphModule, weighted: fx.Node, norm: fx.Node) -> bool:
    """Whether the axis that a batch norm goes by, the second one, is that of a layer's output channels.

    Of a linear layer's results that depends on their rank, so the graph gets a check of it.
    """
    op = operator_of(weighted)
    rank = 2 if op is LINEAR else 2 + (CONV.index(op) if op in CONV else CONV_TRANSPOSE.index(op)) + 1
    # A norm's result has the shape of what it reads, which may come of a rewrite, and have no example yet.
    example = norm.meta.get("example", weighted.meta.get("example"))
    if example is not None and len(example.shape) != rank:
        return False
    if rank > 3:  # Norms of images take batches only.
        return True
    inputs = [node for node in module.graph.nodes if node.op == "placeholder" and "example" in node.meta]
    # Without examples it is the layer itself that has to be looked at.
    for node in inputs if example is not None else [weighted]:
        if not any(user.target == "dim" for user in node.users):
            expected = rank if node is weighted else len(node.meta["example"].shape)
            with module.graph.inserting_after(node):
                size = new_node(module.graph, "call_method", "dim", (node,))
            with module.graph.inserting_after(size):
                new_node(module.graph, "call_function", check_size, (size, expected, f"{node.name}.dim()"))
    return True


def _per_output_channel(factor: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    if not transposed:
        return factor.reshape([-1] + [1] * (weight.dim() - 1))
    # A transposed convolution's weight is (in, out / groups, ...): each group of inputs has its own outputs.
    per_group = factor.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _replaced(module: QGraphModule, reader: fx.Node, old: Any, target: str, value: Tensor) -> fx.Node:
    """A ``get_attr`` of ``value``: in the place of the old tensor, or beside it if others read that one, too."""
    is_taken = len(old.users) > 1 if isinstance(old, fx.Node) else not is_free(module, target)
    if is_taken:
        target = free_target(f"{target}_folded", module)
    set_tensor(module, target, nn.Parameter(value, requires_grad=value.requires_grad))
    if isinstance(old, fx.Node) and not is_taken:
        node = old
    else:
        with module.graph.inserting_before(reader):
            node = new_node(module.graph, "get_attr", target)
    node.meta["example"] = Example.of(value)
    return node


#: Folding of batch norms; what a backend's ``qcore_fusion_patterns`` usually returns, alone or with its own.
BATCH_NORM_FUSIONS: tuple[FusionPattern, ...] = tuple(
    FusionPattern((op, BATCH_NORM), fold_batch_norm, needs_run=False) for op in (*CONV, *CONV_TRANSPOSE, LINEAR)
)
