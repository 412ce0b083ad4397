"""A tracer that knows what the values of its graph are on the example inputs, and settles what is decided by sizes."""

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from qcore.fx.graph_module import computed, submodule
from qcore.fx.guard import aside
from qcore.fx.patches import unpatched
from qcore.fx.signature import check_size
from qcore.fx.thread_tracer import ThreadTracer
from qcore.fx.values import Value, values_in

#: Functions that make tensors of sizes; torch doesn't ask a proxy about them, or asks it wrongly.
_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
)  # fmt: skip
_RANDOM_FACTORIES = ("rand", "randint", "randn", "randperm")
_VARIADIC_FACTORIES = ("empty", "ones", "rand", "randn", "zeros")
SIZE_METHODS = ("size", "dim", "numel", "nelement", "stride", "element_size")
_NUMBER_MODULES = (operator.__name__, math.__name__, builtins.__name__, "_operator")


class UndecidableError(Exception):
    """The forward decides by data, which a graph can't."""


class ExampleTracer(ThreadTracer):
    """The half of qcore's tracer that answers questions about sizes.

    Args:
        examples: the tensors of the example call; ``None`` if there is none, and then nothing is known.
    """

    def __init__(self, examples: Sequence[torch.Tensor] | None) -> None:
        super().__init__()
        self.is_evaluating = False
        self.constants: dict[str, torch.Tensor] = {}
        self._examples = examples
        self._order: list[fx.Node] = []
        self._known: dict[fx.Node, Any] = {}
        self._sizes: dict[fx.Node, tuple[Any, ...]] = {}
        self._settled: set[fx.Node] = set()
        self._from_inputs: set[fx.Node] = set()
        self._asked: list[tuple[fx.Node, Any, tuple[int, int]]] = []
        self._rank_was_read = False
        self.leaf: Callable[[str], torch.nn.Module] = lambda path: submodule(self.root, path)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value of a node, as a forward sees it."""
        return Value(node, self)

    def note(self, node: fx.Node) -> None:
        """A node was added at the end of the graph."""
        self._order.append(node)
        if node.op == "placeholder" or not self._from_inputs.isdisjoint(node.all_input_nodes):
            self._from_inputs.add(node)

    def overwrite(self, value: Value, by: fx.Proxy) -> None:
        """From here on, whoever reads ``value`` reads ``by``."""
        raise NotImplementedError

    def has_example(self, value: Value) -> bool:
        """Whether it is known what a value is on the example inputs."""
        return self._examples is not None

    def example(self, value: Value) -> Any:
        """What a value is on the example inputs; the graph runs up to there.

        It runs in order and only as far as somebody asks, so a forward that decides nothing by sizes costs nothing.
        """
        node = value.node
        if node not in self._known:
            self.is_evaluating = True
            try:
                with torch.no_grad(), aside():
                    for earlier in self._order[len(self._known) :]:
                        self._known[earlier] = self._evaluated(earlier)
            finally:
                self.is_evaluating = False
        return self._known[node]

    def _evaluated(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._known.__getitem__)
        target: Any = node.target
        if node.op == "placeholder":
            assert self._examples is not None
            return self._examples[len(self._known)].clone()
        if node.op == "get_attr" and target in self.constants:
            return self.constants[target]
        if node.op == "call_module":
            return self.leaf(target)(*args, **kwargs)
        return computed(node, args, kwargs, self.root)

    def isinstance(self, value: Any, classes: Any) -> bool:
        """``isinstance`` as a traced forward means it: about what a value stands for.

        A ``__class__`` that says so would do for Python, but torch's C code takes its word for it, and crashes.
        """
        if builtins.isinstance(value, classes):
            return True
        if not issubclass(type(value), Value) or self.is_evaluating or not self.has_example(value):
            return False
        return builtins.isinstance(self.example(value), classes)

    def replacements(self) -> Iterable[tuple[Any, str, Callable[..., Any]]]:
        """Torch's factory functions are nodes of the graph where they are given values of the graph."""
        yield from super().replacements()
        for name in _FACTORIES:
            yield torch, name, self._factory(name, unpatched(torch, name))
        for name in ("is_floating_point", "is_complex"):
            yield torch, name, self._about_dtype(name, unpatched(torch, name))

    def _about_dtype(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """What depends on a tensor's dtype only."""

        def ask(value: Any) -> Any:
            is_known = issubclass(type(value), Value) and not self.is_evaluating and self.has_example(value)
            return getattr(self.example(value), name)() if is_known else function(value)

        return ask

    def _factory(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            # A random number that is drawn while tracing would be the same in every call.
            if self.is_evaluating or not (name in _RANDOM_FACTORIES or values_in((args, kwargs))):
                return function(*args, **kwargs)
            if name in _VARIADIC_FACTORIES and args and not isinstance(args[0], (tuple, list)):
                args = (tuple(args),)
            return self.create_proxy("call_function", function, args, kwargs)

        return factory

    def sizes(self, value: Value) -> tuple[Any, ...]:
        """All sizes of a tensor, as values of the graph."""
        node = value.node
        if node not in self._sizes:
            rank = self.rank(value)
            self._sizes[node] = Sizes(self.create_proxy("call_method", "size", (value, n), {}) for n in range(rank))
        return self._sizes[node]

    def rank(self, value: Value) -> int:
        """The number of dimensions; whoever asks makes the graph hold for inputs of these ranks only."""
        self._rank_was_read = True
        return int(self.example(value).dim())

    def is_size(self, node: fx.Node) -> bool:
        """Whether a node is a number that comes from sizes."""
        if node.op == "call_method":
            return node.target in SIZE_METHODS
        module = getattr(node.target, "__module__", None)
        if node.op != "call_function" or module not in _NUMBER_MODULES or node.target is getattr:
            return False
        return bool(node.all_input_nodes) and all(self.is_size(source) for source in node.all_input_nodes)

    def settle(self, value: Value, asked_at: tuple[int, int] | None = None) -> Any:
        """The number that a value is on the example inputs; the graph will check that it is the same.

        Args:
            value: a size, or what was computed from sizes.
            asked_at: the instruction that asks, if it isn't sure that anything is decided by the answer.

        Raises:
            UndecidableError: the value depends on data.
        """
        if not issubclass(type(value), Value):
            return value  # A size of a parameter.
        node = value.node
        if not self.has_example(value):
            raise UndecidableError("symbolically traced variables cannot be used as inputs to control flow")
        if self._depends_on_data(node):
            raise UndecidableError(f"it decides by the data in {node.name}, which differs from input to input")
        example = self.example(value)
        number = example.item() if isinstance(example, torch.Tensor) and example.numel() == 1 else example
        if not isinstance(example, torch.Tensor):
            if asked_at is None:
                self._settle(node, number)
            else:
                self._asked.append((node, number, asked_at))
        return number

    def forget_asked(self, asked_at: tuple[int, int]) -> None:
        """Nothing was decided by what this instruction asked for."""
        self._asked = [item for item in self._asked if item[2] != asked_at]

    def _settle(self, node: fx.Node, value: Any) -> None:
        if node in self._settled or node not in self._from_inputs:
            return
        self._settled.add(node)
        with self.graph.inserting_after(node):
            self.graph.create_node("call_function", check_size, (node, value, _described(node)))

    def _depends_on_data(self, node: fx.Node) -> bool:
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if current.op == "placeholder":
                return True
            if current.op == "call_method" and current.target in SIZE_METHODS:
                continue
            if current.target is getattr and current.args[1] in ("device", "shape"):
                continue
            fresh = [source for source in current.all_input_nodes if source not in seen]
            seen.update(fresh)
            pending.extend(fresh)
        return False

    def settle_all(self) -> None:
        """At the end of a trace: guard what was settled, and the ranks of the inputs if any rank was read."""
        for node, value, _ in self._asked:
            self._settle(node, value)
        if self._rank_was_read:
            for node in [node for node in self._known if node.op == "placeholder"]:
                self._settle(self.create_node("call_method", "dim", (node,), {}), self._known[node].dim())


class Sizes(tuple[Any, ...]):
    """What ``x.shape`` gives while a forward is traced: the sizes, each a value of the graph or a number."""

    def numel(self) -> Any:
        """The product of the sizes."""
        return math.prod(self)


def _described(node: fx.Node) -> str:
    """A size as a user would write it."""
    if node.op == "call_method":
        inside = ", ".join(str(argument) for argument in node.args[1:])
        return f"{node.args[0]}.{node.target}({inside})"
    names = [_described(argument) if isinstance(argument, fx.Node) else repr(argument) for argument in node.args]
    return f"{getattr(node.target, '__name__', node.target)}({', '.join(names)})" if names else node.name
