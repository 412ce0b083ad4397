"""What a forward computes with tensors that are no values of its graph, while it is traced.

Such calls are made once, and what they give becomes constants of the graph. That is right for tensors that the forward
makes itself; one that was there before is the state of something, and a graph wouldn't write it again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from qcore.fx.values import UndecidableError


class RealCalls(TorchDispatchMode):
    """Watches torch's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_paused = False
        self._made: dict[int, Any] = {}  # The storages too, lest another gets the same number.
        self._written: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Else the first call would import the compiler.

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the tracer itself calls operators."""
        is_innermost = _get_current_dispatch_mode() is self
        if is_innermost:  # As it always is, but in a forward with a mode of its own.
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            if is_innermost:
                self.__enter__()  # type: ignore[no-untyped-call]

    def is_made(self, tensor: Tensor) -> bool:
        """Whether the forward made a tensor, or what it is a view of."""
        return _number(tensor) in self._made

    def is_written(self, tensor: Tensor) -> bool:
        """Whether the graph holds what is in a tensor's memory, and the tensor doesn't."""
        return _number(tensor) in self._written

    def note_written(self, tensor: Tensor) -> None:
        """A value of the graph was written into a tensor."""
        self._written.add(_number(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator.

        Raises:
            UndecidableError: a graph couldn't do the same.
        """
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        schema, known = func._schema, set()
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                known.add(_number(tensor))
                if self.is_written(tensor):
                    raise UndecidableError("it writes data into a tensor that it made, and computes with that")
                if writes and not self.is_made(tensor):
                    raise UndecidableError("it writes into a tensor that is kept for later calls")
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            # ``torch.tensor`` makes its tensor unseen, and has it lifted.
            if isinstance(tensor, Tensor) and (
                _number(tensor) not in known or func is torch.ops.aten.lift_fresh.default
            ):
                self._made[_number(tensor)] = tensor.untyped_storage()
        return result


def _number(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else 0


def shares_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return _number(first) == _number(second)
