"""What code may do besides computing: write into what it is given, draw random numbers, keep state."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qcore.fx.inplace import writes_in_place
from qcore.fx.operators import operator_of

_RANDOM = (
    "rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "binomial", "gumbel", "rrelu", "fractional",
)  # fmt: skip
_LIBRARIES = (
    None, "torch", "torch._C", "torch._C._nn", "torch._C._linalg", "torch.nn.functional", "_operator", "math",
    "builtins", "_functools",
)  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def keeps_no_state(module: nn.Module) -> bool:
    """Whether a module that stays whole is one of torch's own, which stay as they are when they are called."""
    if getattr(module, "max_norm", None) is not None or has_hooks(module):
        return False  # An embedding that writes into its weight, or anything at all.
    return type(module).__module__.startswith("torch.nn.modules.")


def is_harmless(graph: fx.Graph, leaf: Callable[[str], nn.Module]) -> bool:
    """Whether it is sure that what a graph was traced from draws no random numbers and writes into no parameter.

    Args:
        graph: with all nodes, those that nothing reads included.
        leaf: gives the modules that it calls, by path.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_module":
            module = leaf(str(node.target))
            if not keeps_no_state(module) or any(word in type(module).__name__.lower() for word in _RANDOM):
                return False
        elif node.op != "output" and node.args and node.args[0] in constant:
            constant.add(node)
            origin = node.meta.get("origin")
            if origin is None or origin.is_module or writes_in_place(origin.object_type, node.kwargs):
                return False
        if node.op in ("call_function", "call_method") and operator_of(node) is None and not _is_harmless_call(node):
            return False
    return True


def _is_harmless_call(node: fx.Node) -> bool:
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    home = None if isinstance(target, str) else getattr(target, "__module__", None)
    if home not in _LIBRARIES and not home.startswith("qcore."):
        return False
    options = {"out", "max_norm"} & {key for key, value in node.kwargs.items() if value is not None}
    return not options and not any(word in name for word in _RANDOM)
