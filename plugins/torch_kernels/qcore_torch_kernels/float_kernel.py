"""Any operator, computed in float within one kernel."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from qcore.fx.operators import activation_inputs, operator_named, operator_of
from qcore.lowering import BoundaryBuilder, QuantizedCall


class FloatKernel(nn.Module):
    """Any operator, computed in float within one module: dequantizes its inputs and quantizes its result.

    For operators whose cost doesn't matter much, or that a backend has no better kernel for.

    Args:
        call: the place; a chain of several operators isn't taken.
        enter: makes the backend's tensor from a float tensor.
        leave: goes back.
    """

    kernel_name = "float within the kernel"
    replayable = True

    def __init__(self, call: QuantizedCall, enter: BoundaryBuilder, leave: BoundaryBuilder) -> None:
        super().__init__()
        (node,) = call.nodes
        op = operator_of(node)
        assert op is not None
        self.operator = op.name
        numbers = {
            source: number for number, source in enumerate(dict.fromkeys((*activation_inputs(node), *call.computed)))
        }
        # Positions among the inputs take the place of the nodes; the inputs come in the order in which they are read.
        order = [numbers[source] for source in activation_inputs(node)]
        self.places: tuple[Any, ...] = tuple(fx.node.map_aggregate(node.args, lambda a: _placed(a, numbers)))
        self.order = tuple(order)
        self.leave = nn.ModuleList(leave(qparams) for qparams in call.inputs)
        self.enter = enter(call.quantized_output)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The operator's result on the inputs' integers."""
        count = len(self.order)
        floats = zip(self.order, self.leave, inputs[:count], strict=True)
        values: dict[int, Any] = {number: leave(x) for number, leave, x in floats}
        values.update(enumerate(inputs[count:], len(values)))
        args = fx.node.map_aggregate(self.places, lambda a: values[a.number] if isinstance(a, _Place) else a)
        result: Tensor = self.enter(operator_named(self.operator).function(*args))
        return result


@dataclass(frozen=True)
class _Place:
    """Stands for an input among the arguments of a :class:`FloatKernel`."""

    number: int


def _placed(argument: Any, numbers: dict[fx.Node, int]) -> Any:
    return _Place(numbers[argument]) if isinstance(argument, fx.Node) else argument
