"""What code may do besides computing: write into what it is given, draw random numbers, keep state."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from qcore.fx.graph_module import modules_of
from qcore.fx.inplace import name_of, writes_in_place
from qcore.fx.operators import operator_of
from qcore.fx.values import UndecidableError, values_in

_RANDOM = (
    "rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "binomial", "gumbel", "rrelu", "fractional",
)  # fmt: skip
_LIBRARIES = (
    None, "torch", "torch._C", "torch._C._nn", "torch._C._linalg", "torch.nn.functional", "_operator", "math",
    "builtins", "_functools",
)  # fmt: skip
_MODULE_STATE = frozenset(vars(nn.Module()))
_NUMBERS = frozenset({int, float, bool})
_PLAIN = frozenset({type(None), str, torch.dtype, torch.device, torch.Size})


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
    home = None if isinstance(target, str) else getattr(target, "__module__", None)
    if home not in _LIBRARIES and not home.startswith("qcore."):
        return False
    options = {"out", "max_norm"} & {key for key, value in node.kwargs.items() if value is not None}
    return not options and not any(word in name_of(target) for word in _RANDOM)


def refuse_state(model: nn.Module, twins: Mapping[int, Any]) -> None:
    """Look what a forward that was traced on a twin of a model has set.

    Args:
        model: as it was.
        twins: what stood for each of its modules, by identity.

    Raises:
        UndecidableError: it keeps something for later calls.
    """
    for module in modules_of(model):
        twin = twins.get(id(module))
        if not isinstance(twin, nn.Module) or isinstance(twin, torch.jit.ScriptModule):
            continue  # No traced forward sets anything in the latter.
        before = vars(module)
        for name, value in (*vars(twin).items(), *twin._parameters.items(), *twin._buffers.items()):
            if name not in _MODULE_STATE and _is_state(before.get(name), value):
                raise UndecidableError(
                    f"it keeps a value of this call in {type(module).__name__}.{name} for later calls"
                )


def _is_state(before: Any, value: Any) -> bool:
    """Whether what a forward sets is more than a note of what it found."""
    kind = type(value)
    if kind in _NUMBERS:
        return type(before) in _NUMBERS and value is not before and bool(value != before)
    return kind not in _PLAIN and kind is not torch.Tensor and kind is not nn.Parameter and bool(values_in(value))
