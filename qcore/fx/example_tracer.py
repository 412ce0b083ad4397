"""A tracer that knows what the values of its graph are on the example inputs, and settles what is decided by sizes."""

import builtins
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qcore.fx.graph_module import computed, submodule
from qcore.fx.guard import RealCalls, aside, memory_of
from qcore.fx.operators import ADD, CHUNK, GETITEM, MUL, SPLIT, Kind, operator_of
from qcore.fx.signature import check_size
from qcore.fx.thread_tracer import ThreadTracer
from qcore.fx.values import UndecidableError, Value, is_value

if TYPE_CHECKING:
    from qcore.fx.aliases import Aliases

SIZE_METHODS = ("size", "dim", "numel", "nelement", "stride", "element_size")
#: Python's own arithmetic.
NUMBER_MODULES = (operator.__name__, math.__name__, builtins.__name__, "_operator")


class ExampleTracer(ThreadTracer):
    """The half of qcore's tracer that answers questions about sizes.

    Args:
        examples: the tensors of the example call; ``None`` if there is none, and then nothing is known.

    Attributes:
        aliases: which values lie in the same memory; a subclass that adds nodes makes it.
    """

    aliases: "Aliases"

    def __init__(self, examples: Sequence[torch.Tensor] | None) -> None:
        super().__init__()
        self.constants: dict[str, torch.Tensor] = {}
        self.real_calls = RealCalls()
        self.has_examples = examples is not None
        self._examples = examples or ()
        self._order: list[fx.Node] = []
        self._evaluated = 0
        self._tensors: set[fx.Node] = set()
        self._known: dict[fx.Node, Any] = {}
        self._shared: dict[fx.Node, frozenset[fx.Node]] = {}
        self._released: list[fx.Node] = []
        self._values: defaultdict[fx.Node, int] = defaultdict(int)
        self._needs: defaultdict[fx.Node, int] = defaultdict(int)
        self._sizes: dict[fx.Node, tuple[Any, ...]] = {}
        self._settled: dict[fx.Node, Any] = {}
        self._from_inputs: set[fx.Node] = set()
        self._asked: list[tuple[fx.Node, Any]] = []
        self._asked_again: list[fx.Node] | None = None
        self._rank_was_read = False
        self.leaf: Callable[[str], torch.nn.Module] = lambda path: submodule(self.root, path)

    def proxy(self, node: fx.Node) -> Value:
        """The value of a node, as a forward sees it."""
        self._values[node] += 1
        self.hold(node)
        return Value(node, self)

    def released(self, node: fx.Node) -> None:
        """A forward dropped a value; it may be an argument of the call that is being recorded."""
        if vars(self):  # Else the trace is over.
            self._released.append(node)

    def forget_released(self) -> None:
        """What dropped values are on the examples is forgotten once the nodes that read them are known."""
        released, self._released = self._released, []
        for node in released:
            self._values[node] -= 1
            if not self._values[node]:
                self.aliases.forget(node)
            self.let_go(node)

    def is_held(self, node: fx.Node) -> bool:
        """Whether a forward can read a node yet."""
        return self._values[node] > 0

    def hold(self, node: fx.Node) -> None:
        """What a node is on the examples will be needed: by a value, a view, or a node that reads it."""
        self._needs[node] += 1

    def let_go(self, node: fx.Node) -> None:
        """Takes one ``hold`` back."""
        if not vars(self):
            return  # The trace is over.
        self._needs[node] -= 1
        self._forget_unneeded(node)

    def _forget_unneeded(self, node: fx.Node) -> None:
        if not self._needs[node]:
            self._known.pop(node, None)

    def note(self, node: fx.Node) -> None:
        """A node was added at the end of the graph."""
        self._order.append(node)
        sources = node.all_input_nodes
        for source in sources:
            self.hold(source)
        if node.op == "placeholder" or not self._from_inputs.isdisjoint(sources):
            self._from_inputs.add(node)

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a value is a tensor, rather than a number or a tuple; asks the examples if nothing else tells."""
        pending = [node]
        while pending:
            current = pending.pop()
            op = operator_of(current)
            if current.op in ("placeholder", "get_attr") or current in self._tensors:
                break
            if op in (ADD, MUL):  # Python's own, of numbers or of tensors.
                pending.extend(current.all_input_nodes)
            elif op not in (None, GETITEM, CHUNK, SPLIT):
                break
        else:
            if self.is_size(node):
                return False
            if self.has_examples and not builtins.isinstance(self.example(self.proxy(node)), torch.Tensor):
                return False
        self._tensors.add(node)
        return True

    def example(self, value: Value) -> Any:
        """What a value is on the example inputs, but for what was written since; the graph runs up to there.

        It runs in order and only as far as somebody asks, so a forward that decides nothing by sizes costs nothing.
        What no value and no node to come needs any more is dropped, so it takes as much memory as the forward does.
        """
        self.forget_released()
        return self._example(self.aliases.latest(value.node))

    def _example(self, node: fx.Node) -> Any:
        if not self.has_examples:
            raise UndecidableError("symbolically traced variables cannot be used as inputs to control flow")
        if node not in self._known:
            self._run()
        return self._known[node]

    def shares(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node's value lies in the memory of one of its inputs on the example inputs, as far as is known."""
        if not self.has_examples:
            return node.op != "call_module" or not type(submodule(self.root, str(node.target))).__module__.startswith(
                "torch.nn."
            )
        self._run()
        return source in self._shared.get(node, ())

    def _run(self) -> None:
        """Evaluate what was added to the graph."""
        if self._evaluated == len(self._order):
            return
        self.is_evaluating = True
        try:
            with torch.no_grad(), aside():
                while self._evaluated < len(self._order):
                    node = self._order[self._evaluated]
                    value = self._known[node] = self._value_of(node)
                    sources = node.all_input_nodes
                    op = operator_of(node)
                    is_fresh = op is not None and op.kind is not Kind.MOVE
                    if not is_fresh and (storages := _storages(value)):
                        shared = [s for s in sources if not storages.isdisjoint(_storages(self._known[s]))]
                        if shared:
                            self._shared[node] = frozenset(shared)
                    self._evaluated += 1
                    for source in sources:
                        self.let_go(source)
                    if self._evaluated < len(self._order):  # Else it may be about to become a value.
                        self._forget_unneeded(node)
        finally:
            self.is_evaluating = False

    def _value_of(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._known.__getitem__)
        target: Any = node.target
        if node.op == "placeholder":
            return self._examples[self._evaluated].clone()
        if node.op == "get_attr" and target in self.constants:
            return self.constants[target]
        if node.op == "call_module":
            return self.leaf(target)(*args, **kwargs)
        return computed(node, args, kwargs, self.root)

    def isinstance(self, value: Any, classes: Any) -> bool:
        """``isinstance`` as a traced forward means it: about what a value stands for.

        A ``__class__`` that says so would do for Python, but torch's C code takes its word for it, and crashes.
        """
        if is_value(value) and self.has_examples and not builtins.isinstance(value, classes):
            value = self.example(value)
        return builtins.isinstance(value, classes)

    def sizes(self, value: Value) -> tuple[Any, ...]:
        """All sizes of a tensor, as values of the graph."""
        node = self.aliases.latest(value.node)
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
        if node.op != "call_function" or module not in NUMBER_MODULES or node.target is getattr:
            return False
        return bool(node.all_input_nodes) and all(self.is_size(source) for source in node.all_input_nodes)

    def settle(self, value: Value, is_sure: bool = True) -> Any:
        """The number that a value is on the example inputs; the graph will check that it is the same.

        Args:
            value: a size, or what was computed from sizes.
            is_sure: whether something is decided by the answer; if not, ``forget_asked`` may take it back.

        Raises:
            UndecidableError: the value depends on data.
        """
        if not is_value(value):
            return value  # A size of a parameter.
        node = self.aliases.current(value.node)
        if self.has_examples and self._depends_on_data(node):
            raise UndecidableError(f"it decides by the data in {node.name}, which differs from input to input")
        example = self._example(node)
        if builtins.isinstance(example, torch.Tensor):
            return example.item() if example.numel() == 1 else example
        if is_sure:
            self._settled[node] = example
        elif self._asked_again is None:
            self._asked.append((node, example))
        else:
            self._asked_again.append(node)
        return example

    def forget_asked(self, ask_again: Callable[[], Any]) -> bool:
        """A function of torch is to be recorded: it decided nothing by the numbers that it asked for.

        Which those are shows when it is called once more: it asks the same, as the last that was asked.

        Args:
            ask_again: calls it.

        Returns:
            Whether to record it; ``False`` for that second call.
        """
        if self._asked_again is not None:
            return False
        if self._asked:
            asked = self._asked_again = []
            try:
                ask_again()
            finally:
                self._asked_again = None
            if asked and [node for node, _ in self._asked[-len(asked) :]] == asked:
                del self._asked[-len(asked) :]
        return True

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
        settled = self._settled | dict(self._asked)
        if self._rank_was_read:
            inputs = [node for node in self._order if node.op == "placeholder"]
            for node, example in zip(inputs, self._examples, strict=True):
                settled[self.create_node("call_method", "dim", (node,), {})] = example.dim()
        for node, value in settled.items():
            if node in self._from_inputs:
                with self.graph.inserting_after(node):
                    self.graph.create_node("call_function", check_size, (node, value, _described(node)))


class Sizes(tuple[Any, ...]):
    """What ``x.shape`` gives while a forward is traced: the sizes, each a value of the graph or a number."""

    def numel(self) -> Any:
        """The product of the sizes."""
        return math.prod(self)


def _storages(value: Any) -> set[int]:
    """What tells the memory of the tensors in a value apart."""
    if type(value) in (int, float, bool, torch.Size):
        return set()
    leaves = (value,) if builtins.isinstance(value, torch.Tensor) else pytree.tree_leaves(value)
    return {memory_of(leaf) for leaf in leaves if builtins.isinstance(leaf, torch.Tensor)} - {0}


def _described(node: fx.Node) -> str:
    """A size as a user would write it."""
    if node.op == "call_method":
        inside = ", ".join(str(argument) for argument in node.args[1:])
        return f"{node.args[0]}.{node.target}({inside})"
    names = [_described(argument) if isinstance(argument, fx.Node) else repr(argument) for argument in node.args]
    return f"{getattr(node.target, '__name__', node.target)}({', '.join(names)})" if names else node.name
