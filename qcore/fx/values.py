"""What a forward sees while it is traced: proxies that know what they stand for on the example inputs.

A plain fx proxy stops at the first ``for``, ``len``, ``int`` or comparison. Sizes are no data, though: on the example
inputs they are known, and what the forward decides by them can be settled and guarded (``ExampleTracer.settle``).
Arithmetic on sizes stays in the graph, so that a batch of another size passes through.
"""

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from qcore.fx.example_tracer import ExampleTracer

#: Properties of a tensor, and methods, that don't depend on its data, and that a graph may take as they are.
_PLAIN_PROPERTIES = (
    "dtype", "layout", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "requires_grad", "is_floating_point",
    "is_complex",
)  # fmt: skip
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
#: Python's in-place operators: what each calls, and the plain form of that.
INPLACE_OPERATORS = {
    f"__i{name}__": (getattr(operator, f"__i{name}__"), getattr(operator, f"__{name}__")) for name in _ARITHMETIC
}


class UndecidableError(Exception):
    """The forward does what a graph can't, such as to decide by data."""


class Value(fx.Proxy):
    """A traced value: a tensor, a size, or a tuple of them."""

    tracer: "ExampleTracer"

    def __del__(self) -> None:
        node = vars(self).get("node")
        if node is not None:
            self.tracer.released(node)

    def __copy__(self) -> "Value":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), self.tracer.create_proxy("call_method", "clone", (self,), {}))

    def __getattr__(self, name: str) -> Any:
        if self.tracer.has_examples:
            if name in _PLAIN_PROPERTIES:
                return getattr(self.tracer.example(self), name)
            if name == "shape":
                return self.tracer.sizes(self)
            if name == "ndim":
                return self.tracer.rank(self)
            if name in ("dim", "ndimension"):
                return lambda: self.tracer.rank(self)
        return Attribute(self, name)

    def size(self, dim: Any = None) -> Any:
        """One size, or all of them, each a value of the graph."""
        if dim is None and self.tracer.has_examples:
            return self.tracer.sizes(self)
        return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})

    @property
    def data(self) -> Any:
        """The tensor without its gradients, in the same memory."""
        return Attribute(self, "data")

    @data.setter
    def data(self, value: Any) -> None:
        raise UndecidableError("it assigns to .data of a tensor")

    def __len__(self) -> int:
        example = self.tracer.example(self)
        return int(self.tracer.settle(self.size(0))) if isinstance(example, torch.Tensor) else len(example)

    def __iter__(self) -> Iterator[Any]:
        if not self.tracer.has_examples:
            return super().__iter__()
        return iter([self.__getitem__(number) for number in range(len(self))])

    def __bool__(self) -> bool:
        return bool(self.tracer.settle(self))

    def __int__(self) -> int:
        return int(self.tracer.settle(self))

    def __float__(self) -> float:
        return float(self.tracer.settle(self))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.settle(self), digits)

    def __index__(self) -> int:
        # Torch asks for this when it looks whether an argument fits, and then hands the proxy itself to
        # __torch_function__, which takes the question back.
        return operator.index(self.tracer.settle(self, is_sure=False))

    def __setitem__(self, index: Any, value: Any) -> None:
        if not is_value(value) or not self.tracer.aliases.is_item(value.node, self.node, self.tracer.create_arg(index)):
            self.tracer.create_proxy("call_method", "__setitem__", (self, index, value), {})

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record a call of a torch function."""
        for tracer in {value.tracer for value in values_in((args, kwargs))}:
            if not tracer.forget_asked(lambda: orig_method(*(args or ()), **(kwargs or {}))):
                return None
        return super().__torch_function__(orig_method, types, args, kwargs)


def _inplace(overwriting: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[Value, Any], Any]:
    def write(self: Value, other: Any) -> Any:
        # Whoever else holds a number doesn't see it change.
        function = overwriting if self.tracer.is_tensor(self.node) else plain
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name, _functions in INPLACE_OPERATORS.items():
    setattr(Value, _name, _inplace(*_functions))


class Attribute(Value):
    """An attribute of a value, which becomes a method call if it is called."""

    def __init__(self, root: Value, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self._made: fx.Proxy | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node, made when first needed: most attributes are methods."""
        if self._made is None:
            self._made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
        made: fx.Node = self._made.node
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A method call."""
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def is_value(item: Any) -> bool:
    """Whether something is a traced value; ``isinstance`` means another thing to who is traced."""
    return issubclass(type(item), Value)


def values_in(argument: Any) -> list[Value]:
    """The traced values among nested arguments."""
    found: list[Value] = []
    pending = [argument]
    while pending:
        item = pending.pop()
        if is_value(item):
            found.append(item)
        elif type(item) is slice:
            pending.extend((item.start, item.stop, item.step))
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (tuple, list)):
            pending.extend(item)
    return found
