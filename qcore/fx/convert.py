"""The pass from a calibrated model to a reference model: float operators between quantize and dequantize.

The reference model runs anywhere and defines what a backend's kernels must compute. It works on plain integer tensors;
weights are stored as integers. The prepared model is left as it was.
"""

import copy
import warnings
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from qcore import ops
from qcore.errors import CalibrationError, CalibrationWarning, ConfigError
from qcore.fx.graph_module import (
    Preparation,
    QGraphModule,
    get_attribute,
    has_attribute,
    place_for,
    set_tensor,
    submodule,
)
from qcore.fx.nodes import copied_graph, drop_unread, new_node
from qcore.fx.observe import observer_nodes
from qcore.fx.operators import activation_inputs, operator_of
from qcore.fx.weights import FloatWeight, IntegerWeight, quantize_weights
from qcore.observer import ObserverBase
from qcore.quantization_plan import QuantizationPlan, QuantizedTensor


def convert_to_reference(
    prepared: QGraphModule, preparation: Preparation, kernels: dict[type[ObserverBase], type[ObserverBase]]
) -> QGraphModule:
    """Replace every observer by quantize and dequantize, and every planned weight by integers.

    Args:
        prepared: after calibration; it isn't changed.
        preparation: what ``prepare_fx`` settled.
        kernels: the backend's implementations of observers, for the weights.

    Raises:
        CalibrationError: some observers saw no data; names them.
        ConfigError: a weight holds NaN or infinity, or a scale is larger than a kernel takes.
    """
    plan = preparation.plan
    observers = {number: _observer(prepared, name) for number, name in plan.observers.items()}
    _check_calibration(observers, plan)
    return _Conversion(prepared, preparation, observers, kernels).run()


def _observer(prepared: QGraphModule, name: str) -> ObserverBase:
    observer = prepared.get_submodule(name)
    assert isinstance(observer, ObserverBase), f"{name} is {type(observer).__name__}"
    return observer


def _check_calibration(observers: dict[int, ObserverBase], plan: QuantizationPlan) -> None:
    empty = [plan.observers[number] for number, observer in observers.items() if not observer.has_data]
    if empty:
        watched = {o.tensor: o.value for o in reversed(plan.observations)}
        values = {name: watched[number] for number, name in plan.observers.items()}
        counts = {plan.observers[number]: observer.nonfinite_count for number, observer in observers.items()}
        seen = [f"{name} (output of {values[name]}){_only_nonfinite(counts[name])}" for name in empty]
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        what = "no finite data" if any(counts[name] for name in empty) else "no data"
        raise CalibrationError(
            f"{len(empty)} of {len(observers)} observers saw {what}: {', '.join(seen[:5])}{more}. Run the prepared "
            "model on representative inputs before convert_fx: with torch.no_grad(): prepared(batch)",
            empty,
        )


def _only_nonfinite(count: int) -> str:
    return f", which met {count} values, all NaN or infinite" if count else ""


def _all_qparams(observers: dict[int, ObserverBase]) -> dict[int, tuple[Tensor, Tensor]]:
    by_class: dict[type[ObserverBase], list[int]] = {}
    for number, observer in observers.items():
        by_class.setdefault(type(observer), []).append(number)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for observer_class, numbers in by_class.items():
        found.update(zip(numbers, observer_class.calculate_all([observers[n] for n in numbers]), strict=True))
    return {number: found[number] for number in observers}


def weight_position(node: fx.Node) -> int:
    """Which argument of an operator with a weight that is."""
    op = operator_of(node)
    assert op is not None and op.weight is not None
    return op.weight


class _Conversion:
    def __init__(
        self,
        prepared: QGraphModule,
        preparation: Preparation,
        observers: dict[int, ObserverBase],
        kernels: dict[type[ObserverBase], type[ObserverBase]],
    ) -> None:
        self.prepared = prepared
        self.preparation = preparation
        self.plan = preparation.plan
        self.observers = observers
        self.kernels = kernels
        self.graph = copied_graph(prepared.graph)
        self.root = nn.Module()
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.qparam_nodes: dict[int, tuple[fx.Node, fx.Node]] = {}
        self.quantized_readers = {weight.node for weight in self.plan.weights}
        self.clamps_before: dict[str, list[str]] = {}
        for clamp, result in self.plan.absorbed.items():
            self.clamps_before.setdefault(result, []).append(clamp)
        self.qparams = _all_qparams(observers)
        self.notes: list[str] = []
        self.memo: dict[int, object] = {}
        observers_called = set(self.plan.observers.values())
        self.called = {
            str(node.target)
            for node in self.graph.nodes
            if node.op == "call_module" and node.target not in observers_called
        }

    def run(self) -> QGraphModule:
        self.check_scales()
        self.report_nonfinite()
        self.take_modules()
        self.quantize_weights()
        for name, bounds in self.plan.dynamic.items():
            reader = self.nodes[name]
            (value,) = activation_inputs(reader)
            with self.graph.inserting_before(reader):
                rounded = new_node(self.graph, "call_function", ops.dynamic_quantize_dequantize, (value, *bounds))
            reader.replace_input_with(value, rounded)
        for node, number in observer_nodes(self.prepared, self.plan):
            self.replace_observer(self.nodes[node.name], number)
        for name, number in self.plan.shared.items():
            node = self.nodes[name]
            with self.graph.inserting_after(node):
                marker = new_node(self.graph, "call_function", torch.detach, (node,))
            node.replace_all_uses_with(marker, delete_user_cb=lambda user, marker=marker: user is not marker)
            self.replace_observer(marker, number)
        for name in self.plan.absorbed:
            clamp = self.nodes[name]
            clamp.replace_all_uses_with(clamp.all_input_nodes[0])
            self.graph.erase_node(clamp)
        drop_unread(self.graph)
        self.take_attributes()
        plan = replace(self.plan, notes=(*self.plan.notes, *self.notes))
        module = QGraphModule.of(self.root, self.graph, is_raw=True)
        module.train(self.prepared.training)
        for name in self.preparation.preserved:
            setattr(module, name, copy.deepcopy(getattr(self.prepared, name)))
        return module.with_preparation(self.preparation.at("reference", plan))

    def check_scales(self) -> None:
        """Refuse scales that are larger than a kernel takes."""
        problems = []
        for number, (scale, _) in self.qparams.items():
            limit = self.plan.tensors[number].scale_max
            if limit is not None and float(scale.max()) > limit:
                problems.append(
                    f"{self.plan.observers[number]} found the scale {float(scale.max()):g}, and a kernel takes at most "
                    f"{limit:g} (scale_max_upper_bound); keep its operator float, or calibrate on smaller values"
                )
        if problems:
            raise ConfigError(problems)

    def report_nonfinite(self) -> None:
        for number, observer in self.observers.items():
            if observer.nonfinite_count:
                self.notes.append(
                    f"{self.plan.observers[number]} met {observer.nonfinite_count} NaN or infinite values"
                )
        if self.notes:
            listed = "\n".join(f"  - {note}" for note in self.notes)
            warnings.warn(
                f"calibration data led to values that aren't finite; they were left out of the ranges:\n{listed}",
                CalibrationWarning,
                stacklevel=4,
            )

    def qparams_of(self, number: int, before: fx.Node) -> tuple[fx.Node, fx.Node]:
        """``get_attr`` nodes of a scale and a zero point; the same two for all who use them."""
        if number not in self.qparam_nodes:
            name = self.plan.observers[number]
            scale, zero_point = self.qparams[number]
            self.root.register_buffer(f"{name}_scale", scale.detach().clone())
            self.root.register_buffer(f"{name}_zero_point", zero_point.detach().clone())
            with self.graph.inserting_before(before):
                self.qparam_nodes[number] = (
                    new_node(self.graph, "get_attr", f"{name}_scale"),
                    new_node(self.graph, "get_attr", f"{name}_zero_point"),
                )
        return self.qparam_nodes[number]

    def replace_observer(self, node: fx.Node, number: int) -> None:
        """Put quantize and dequantize in the place of ``node``, which hands its input through."""
        value = node.all_input_nodes[0]
        scale, zero_point = self.qparams_of(number, node)
        tensor = self.plan.tensors[number]
        low, high = self.bounds(value.name, number, tensor)
        with self.graph.inserting_before(node):
            quantized = new_node(
                self.graph,
                "call_function",
                ops.quantize_per_tensor,
                (value, scale, zero_point, low, high, tensor.traits.dtype),
            )
            result = new_node(self.graph, "call_function", ops.dequantize_per_tensor, (quantized, scale, zero_point))
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def bounds(self, value: str, number: int, tensor: QuantizedTensor) -> tuple[int, int]:
        """The integers that a quantize may give: the tensor's range, cut by the clamps that it stands for.

        Rounding is monotone, so to clamp and then quantize is to quantize and then clamp between the bounds' integers.
        """
        low, high = tensor.quant_min, tensor.quant_max
        for name in self.clamps_before.get(value, ()):
            _, least, most = self.nodes[name].args[:3]
            low = low if least is None else max(low, self.integer(float(least), number))
            high = high if most is None else min(high, self.integer(float(most), number))
        return low, high

    def integer(self, value: float, number: int) -> int:
        """The integer that stands for a real number with some qparams."""
        scale, zero_point = self.qparams[number]
        low, high = self.plan.tensors[number].quant_min, self.plan.tensors[number].quant_max
        if value == 0:  # As most bounds are; it needs no tensor.
            return min(max(int(zero_point), low), high)
        return int(ops.quantize_per_tensor(torch.tensor(value), scale, zero_point, low, high, torch.int32))

    def quantize_weights(self) -> None:
        """Let every planned operator read integers; a weight that several operators read alike is stored once."""
        readers: dict[tuple[str, QuantizedTensor], list[fx.Node]] = {}
        for planned in self.plan.weights:
            reader = self.nodes[planned.node]
            readers.setdefault((str(self.weight_source(reader).target), planned.tensor), []).append(reader)
        found = quantize_weights(
            [FloatWeight(name, get_attribute(self.prepared, name).detach(), tensor) for name, tensor in readers],
            self.kernels,
        )
        for weight, nodes in zip(found, readers.values(), strict=True):
            dequantize = self.store_weight(weight, self.weight_source(nodes[0]))
            for node in nodes:
                args = list(node.args)
                args[weight_position(node)] = dequantize
                node.args = tuple(args)

    @staticmethod
    def weight_source(reader: fx.Node) -> fx.Node:
        source = reader.args[weight_position(reader)]
        assert isinstance(source, fx.Node)
        return source

    def store_weight(self, weight: IntegerWeight, source: fx.Node) -> fx.Node:
        """Keep integers in the place of a float weight and return the node that dequantizes them."""
        target = stem = str(source.target)
        number = 0
        while self.is_taken(stem, number) or (number == 0 and self.is_read_as_float(source)):
            number += 1
            stem = f"{target}_int{number}"
        set_tensor(self.root, stem, weight.values)
        set_tensor(self.root, f"{stem}_scale", weight.scale)
        set_tensor(self.root, f"{stem}_zero_point", weight.zero_point)
        axis = () if weight.axis is None else (weight.axis,)
        dequantize = ops.dequantize_per_tensor if weight.axis is None else ops.dequantize_per_channel
        with self.graph.inserting_before(source):
            attributes = [
                new_node(self.graph, "get_attr", name) for name in (stem, f"{stem}_scale", f"{stem}_zero_point")
            ]
            return new_node(self.graph, "call_function", dequantize, (*attributes, *axis))

    def is_taken(self, stem: str, number: int) -> bool:
        """Whether a name for integers, or one for their qparams, belongs to something else already."""
        others = [f"{stem}_scale", f"{stem}_zero_point", *([stem] if number else [])]
        return has_attribute(self.root, stem) or any(has_attribute(self.prepared, name) for name in others)

    def is_read_as_float(self, source: fx.Node) -> bool:
        owner, _, _ = str(source.target).rpartition(".")
        if source.target in self.preparation.preserved or owner in self.called:
            return True
        return any(user.name not in self.quantized_readers for user in source.users)

    def take_modules(self) -> None:
        """Copy the modules that the graph calls, before anything takes their place."""
        for target in sorted(self.called):
            owner, _, name = target.rpartition(".")
            module = copy.deepcopy(submodule(self.prepared, target), self.memo)
            place_for(self.root, owner).add_module(name, module)

    def take_attributes(self) -> None:
        """Copy what the graph still reads from the prepared model."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and not has_attribute(self.root, str(node.target)):
                value = copy.deepcopy(get_attribute(self.prepared, str(node.target)), self.memo)
                set_tensor(self.root, str(node.target), value)
