"""The pass after the proof: what is constant becomes a tensor, and what holds linear layers inside shows them.

These rewrites are exact as mathematics and not to the last bit, so they come after the replay. Each is one function.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qcore.fx.graph_module import QGraphModule, get_attribute, set_tensor
from qcore.fx.hooks import hook_of
from qcore.fx.names import free_target
from qcore.fx.nodes import drop_unread, new_node
from qcore.fx.operators import CHUNK, LINEAR, MATMUL, RESHAPE, SOFTMAX, TRANSPOSE, operator_of
from qcore.fx.shapes import Example

_CONSTANT_FUNCTIONS = ("torch", "torch._C", "torch._C._nn", "torch._C._linalg", "torch.nn.functional", "_operator")
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")


def expand(module: QGraphModule) -> bool:
    """Apply every rewrite of this file; changes ``module`` and returns whether it did.

    Args:
        module: in normal form, with examples; it must be one of qcore's own.
    """
    changed = False
    for node in list(module.graph.nodes):
        changed |= any(rewrite(module, node) for rewrite in (_attention, _constant, _product_with_a_matrix))
    if changed:
        drop_unread(module.graph)
        _drop_unread_tensors(module)
    return changed


def _constant(module: QGraphModule, node: fx.Node) -> bool:
    """A tensor that is computed from parameters alone, such as a normed weight, is computed once.

    Only where that takes no more memory than what it is computed from.
    """
    sources = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not sources or "example" not in node.meta:
        return False
    if any(source.op != "get_attr" for source in sources):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    known = isinstance(node.target, str) or getattr(node.target, "__module__", None) in (*_CONSTANT_FUNCTIONS, None)
    if not known or name.endswith("_") or any(word in name for word in _RANDOM):
        return False
    tensors = {source: get_attribute(module, str(source.target)) for source in sources}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: tensors[source].detach())
    with torch.no_grad():
        function: Any = getattr(type(args[0]), node.target) if isinstance(node.target, str) else node.target
        value = function(*args, **kwargs)
    if not isinstance(value, Tensor) or value.numel() > sum(tensor.numel() for tensor in tensors.values()):
        return False
    is_parameter = value.is_floating_point()
    value = value.clone(memory_format=torch.contiguous_format)
    node.replace_all_uses_with(
        _new_tensor(module, node, f"{sources[0].target}_{name}", nn.Parameter(value) if is_parameter else value)
    )
    return True


def _product_with_a_matrix(module: QGraphModule, node: fx.Node) -> bool:
    """``x @ w`` and ``addmm(bias, x, w)`` with a matrix of parameters are a linear layer with its transpose."""
    bias: Any = None
    if operator_of(node) is MATMUL:
        x, matrix = node.args
    elif node.target is torch.addmm and not node.kwargs and len(node.args) == 3:
        bias, x, matrix = node.args
    else:
        return False
    if not _is_tensor(matrix, 2) or not (bias is None or _is_tensor(bias, 1)):
        return False
    assert isinstance(matrix, fx.Node)
    if bias is not None and bias.meta["example"].shape[0] != matrix.meta["example"].shape[1]:
        return False  # One number for all, which a linear layer's bias isn't.
    with torch.no_grad():
        transposed = nn.Parameter(get_attribute(module, str(matrix.target)).detach().t().contiguous())
    weight = _new_tensor(module, node, f"{matrix.target}_t", transposed)
    node.replace_all_uses_with(_Builder(module, node).call(LINEAR.function, x, weight, bias))
    return True


def _is_tensor(argument: Any, rank: int) -> bool:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return False
    example = argument.meta.get("example")
    return example is not None and len(example.shape) == rank and example.dtype == torch.float32


def _attention(module: QGraphModule, node: fx.Node) -> bool:
    """``nn.MultiheadAttention`` as its four linear layers and the attention between them.

    The arithmetic is that of ``F.multi_head_attention_forward``; a module with ``bias_k`` or ``add_zero_attn`` stays.
    """
    if node.op != "call_module":
        return False
    attention = module.get_submodule(str(node.target))
    if type(attention) is not nn.MultiheadAttention or attention.bias_k is not None or attention.add_zero_attn:
        return False
    if any(hook_of(inner) for inner in (attention, attention.out_proj)):
        return False
    if any(user.target is not operator.getitem or user.args[1] not in (0, 1) for user in node.users):
        return False
    call: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, value = call["query"], call["key"], call["value"]
    example = query.meta.get("example")
    if example is None or len(example.shape) not in (2, 3):
        return False
    build = _Builder(module, node)
    is_batched = len(example.shape) == 3

    def batch_first(x: fx.Node) -> fx.Node:
        if not is_batched:
            return build.call(torch.unsqueeze, x, 0)
        return x if attention.batch_first else build.call(TRANSPOSE.function, x, 0, 1)

    firsts = {x: batch_first(x) for x in dict.fromkeys((query, key, value))}
    query, key, value = firsts[query], firsts[key], firsts[value]
    path = str(node.target)
    bias = None if attention.in_proj_bias is None else f"{path}.in_proj_bias"
    if attention.in_proj_weight is not None and query is key is value:
        projected = build.call(
            LINEAR.function, query, build.attribute(f"{path}.in_proj_weight"), bias and build.attribute(bias)
        )
        parts = build.call(CHUNK.function, projected, 3, -1)
        q, k, v = (build.call(operator.getitem, parts, number) for number in range(3))
    else:
        q, k, v = (
            build.call(LINEAR.function, x, *_projection(module, node, attention, number))
            for number, x in enumerate((query, key, value))
        )
    batch, heads, size = build.method("size", query, 0), attention.num_heads, attention.head_dim
    q, k, v = (
        build.call(
            TRANSPOSE.function, build.call(RESHAPE.function, x, (batch, build.method("size", x, 1), heads, size)), 1, 2
        )
        for x in (q, k, v)
    )
    masks = (call.get("attn_mask"), call.get("key_padding_mask"))
    mask = build.call(joined_mask, *masks, heads) if any(mask is not None for mask in masks) else None
    weights = None
    if call.get("need_weights", True) and any(user.args[1] == 1 for user in node.users):
        scaled = build.call(operator.mul, q, 1 / math.sqrt(size))
        scores = build.call(MATMUL.function, scaled, build.call(TRANSPOSE.function, k, -2, -1))
        scores = scores if mask is None else build.call(operator.add, scores, mask)
        weights = build.call(SOFTMAX.function, scores, -1)
        y = build.call(MATMUL.function, weights, v)
        if call.get("average_attn_weights", True):
            weights = build.call(torch.mean, weights, (1,), False)
        weights = weights if is_batched else build.call(torch.squeeze, weights, 0)
    else:
        y = build.call(F.scaled_dot_product_attention, q, k, v, mask)
    y = build.call(TRANSPOSE.function, y, 1, 2)
    y = build.call(RESHAPE.function, y, (batch, build.method("size", y, 1), attention.embed_dim))
    out_bias = None if attention.out_proj.bias is None else build.attribute(f"{path}.out_proj.bias")
    y = build.call(LINEAR.function, y, build.attribute(f"{path}.out_proj.weight"), out_bias)
    if not is_batched:
        y = build.call(torch.squeeze, y, 0)
    elif not attention.batch_first:
        y = build.call(TRANSPOSE.function, y, 0, 1)
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(y)
        elif weights is not None:
            user.replace_all_uses_with(weights)
        else:
            _replace_by_none(user)
    return True


def _replace_by_none(node: fx.Node) -> None:
    def without(argument: fx.Node) -> fx.Node | None:
        return None if argument is node else argument

    for reader in list(node.users):
        reader.args = fx.node.map_aggregate(reader.args, lambda a: without(a) if isinstance(a, fx.Node) else a)
        reader.kwargs = fx.node.map_aggregate(reader.kwargs, lambda a: without(a) if isinstance(a, fx.Node) else a)


def joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int) -> Tensor:
    """The two masks of ``nn.MultiheadAttention`` as one to add to the scores, (batch, heads, queries, keys)."""
    joined: Any = 0.0
    if attn_mask is not None:
        additive = _additive(attn_mask)
        joined = additive.reshape(-1, heads, *additive.shape[-2:]) if additive.dim() == 3 else additive
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask.unsqueeze(0))
        joined = joined + padding[:, None, None, :]
    result: Tensor = joined
    return result


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(mask, -math.inf)


def _projection(
    module: QGraphModule, node: fx.Node, attention: nn.MultiheadAttention, number: int
) -> tuple[fx.Node, fx.Node | None]:
    """Weight and bias of the query's, key's or value's own projection."""
    letter, size = "qkv"[number], attention.embed_dim
    rows = slice(number * size, (number + 1) * size)
    build = _Builder(module, node)
    if attention.in_proj_weight is None:
        weight = build.attribute(f"{node.target}.{letter}_proj_weight")
    else:
        part = nn.Parameter(attention.in_proj_weight.detach()[rows].clone())
        weight = _new_tensor(module, node, f"{node.target}.{letter}_proj_weight_part", part)
    if attention.in_proj_bias is None:
        return weight, None
    part = nn.Parameter(attention.in_proj_bias.detach()[rows].clone())
    return weight, _new_tensor(module, node, f"{node.target}.{letter}_proj_bias_part", part)


class _Builder:
    """Adds nodes before another, which they stand for."""

    def __init__(self, module: QGraphModule, node: fx.Node) -> None:
        self.module = module
        self.node = node

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self._new("call_function", function, args)

    def method(self, name: str, *args: Any) -> fx.Node:
        return self._new("call_method", name, args)

    def attribute(self, target: str) -> fx.Node:
        made = self._new("get_attr", target, ())
        made.meta["example"] = Example.of(get_attribute(self.module, target))
        return made

    def _new(self, op: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self.module.graph.inserting_before(self.node):
            made = new_node(self.module.graph, op, target, args)
        if op != "get_attr" and "origin" in self.node.meta:
            made.meta["origin"] = self.node.meta["origin"]
        return made


_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")


def _new_tensor(module: QGraphModule, node: fx.Node, target: str, value: Tensor) -> fx.Node:
    target = free_target(target, module)
    set_tensor(module, target, value)
    return _Builder(module, node).attribute(target)


def _drop_unread_tensors(module: QGraphModule) -> None:
    """Free what no node reads any more; a GraphModule made anew holds what its graph reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in read and not any(name.startswith(f"{target}.") for target in read):
            owner, _, last = name.rpartition(".")
            delattr(module.get_submodule(owner), last)
