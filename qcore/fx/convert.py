"""The pass from a calibrated model to a reference model: float operators between quantize and dequantize.

The reference model runs anywhere and defines what a backend's kernels must compute. It works on plain integer tensors;
weights are stored as integers. The prepared model is left as it was.
"""

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcore import ops
from qcore.errors import CalibrationError, CalibrationWarning, ConfigError
from qcore.fx.graph_module import (
    QGraphModule,
    adopt,
    get_attribute,
    is_persistent,
    place_for,
    set_tensor,
    submodule,
    with_record,
)
from qcore.fx.names import free_target, is_free, qparams_targets
from qcore.fx.nodes import copied_graph, drop_unread, new_node
from qcore.fx.observe import observer_nodes
from qcore.fx.operators import activation_inputs
from qcore.fx.record import Record
from qcore.fx.shapes import Example
from qcore.fx.verify import check_reference
from qcore.fx.weights import FloatWeight, IntegerWeight, quantize_weights
from qcore.observer import ObserverBase, StandIns
from qcore.quantization_plan import QParamsSpec


def convert_to_reference(
    prepared: QGraphModule,
    record: Record,
    stand_ins: StandIns,
    memo: dict[int, Any],
) -> QGraphModule:
    """Replace every observer by quantize and dequantize, and every planned weight by integers.

    Args:
        prepared: after calibration; it isn't changed.
        record: of it; what it preserves may be more than what ``prepare_fx`` did.
        stand_ins: the backend's observers in the place of others, for the weights.
        memo: of deepcopy; what the parts of a model share, their copies share.

    Raises:
        CalibrationError: some observers saw no data; names them.
        ConfigError: a weight holds NaN or infinity, or a scale is larger than a kernel takes.
        GraphError: the result isn't what the plan says.
    """
    observers = {number: _observer(prepared, name) for number, name in record.observers.items()}
    _check_calibration(observers, record)
    reference = _Conversion(prepared, record, observers, stand_ins, memo).run()
    check_reference(reference, prepared, record)
    return reference


def _observer(prepared: QGraphModule, name: str) -> ObserverBase:
    observer = prepared.get_submodule(name)
    assert isinstance(observer, ObserverBase), f"{name} is {type(observer).__name__}"
    return observer


def _check_calibration(observers: dict[int, ObserverBase], record: Record) -> None:
    empty = [record.observers[number] for number, observer in observers.items() if not observer.has_data]
    if empty:
        watched = {o.qparams: o.value for o in reversed(record.plan.observations)}
        values = {name: watched[number] for number, name in record.observers.items()}
        counts = {record.observers[number]: observer.nonfinite_count for number, observer in observers.items()}
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


def _source(reader: fx.Node, argument: int) -> fx.Node:
    """The node that gives an argument."""
    source = reader.args[argument]
    assert isinstance(source, fx.Node)
    return source


class _Conversion:
    def __init__(
        self,
        prepared: QGraphModule,
        record: Record,
        observers: dict[int, ObserverBase],
        stand_ins: StandIns,
        memo: dict[int, Any],
    ) -> None:
        self.prepared = prepared
        self.record = record
        self.plan = record.plan
        self.observers = observers
        self.stand_ins = stand_ins
        self.graph = copied_graph(prepared.graph)
        self.root = nn.Module()
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.qparam_nodes: dict[int, tuple[fx.Node, fx.Node]] = {}
        self.read_as_float = self.float_targets()
        self.qparams = _all_qparams(observers)
        self.notes: list[str] = []
        self.memo = memo
        observers_called = set(record.observers.values())
        self.called = {
            str(node.target)
            for node in self.graph.nodes
            if node.op == "call_module" and node.target not in observers_called
        }

    def run(self) -> QGraphModule:
        self.check_scales()
        self.report_nonfinite()
        for name in self.record.preserved:
            adopt(self.root, self.prepared, name, lambda value: copy.deepcopy(value, self.memo))
        self.take_modules()
        self.quantize_weights()
        for name, bounds in self.plan.dynamic.items():
            reader = self.nodes[name]
            for value in dict.fromkeys(activation_inputs(reader)):
                with self.graph.inserting_before(reader):
                    rounded = self.call(ops.dynamic_quantize_dequantize, value, *bounds, dtype=torch.float32)
                reader.replace_input_with(value, rounded)
        for node, number in observer_nodes(self.prepared, self.record.observers):
            self.replace_observer(self.nodes[node.name], number)
        for name, number in self.plan.shared.items():
            node = self.nodes[name]
            with self.graph.inserting_after(node):
                marker = new_node(self.graph, "call_function", torch.detach, (node,))
            node.replace_all_uses_with(marker, delete_user_cb=lambda user, marker=marker: user is not marker)
            self.replace_observer(marker, number)
        drop_unread(self.graph)
        self.take_attributes()
        module = QGraphModule.of(self.root, self.graph, is_raw=True)
        for name in self.record.preserved:
            adopt(module, self.root, name)
        module.train(self.prepared.training)
        return with_record(module, replace(self.record, stage="reference", notes=(*self.record.notes, *self.notes)))

    def check_scales(self) -> None:
        """Refuse scales that are larger than a kernel takes."""
        problems = []
        for number, (scale, _) in self.qparams.items():
            limit = self.plan.qparams[number].scale_max
            if limit is not None and float(scale.max()) > limit:
                problems.append(
                    f"{self.record.observers[number]} found the scale {float(scale.max()):g}, and a kernel takes at "
                    f"most {limit:g} (scale_max_upper_bound); keep its operator float, or calibrate on smaller values"
                )
        if problems:
            raise ConfigError(problems)

    def report_nonfinite(self) -> None:
        for number, observer in self.observers.items():
            if observer.nonfinite_count:
                self.notes.append(
                    f"{self.record.observers[number]} met {observer.nonfinite_count} NaN or infinite values"
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
            scale, zero_point = (value.detach().clone() for value in self.qparams[number])
            self.qparam_nodes[number] = self.store_qparams(self.record.observers[number], scale, zero_point, before)
        return self.qparam_nodes[number]

    def store_qparams(self, name: str, scale: Tensor, zero_point: Tensor, before: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Keep qparams under a name that is theirs, such as that of their observer, and return the nodes of both."""
        targets = qparams_targets(name)
        set_tensor(self.root, targets[0], scale)
        set_tensor(self.root, targets[1], zero_point)
        with self.graph.inserting_before(before):
            return new_node(self.graph, "get_attr", targets[0]), new_node(self.graph, "get_attr", targets[1])

    def call(self, function: Any, value: fx.Node, *arguments: Any, dtype: torch.dtype) -> fx.Node:
        """A node, where the graph inserts, that makes another dtype of a value; a node of the user's has no example."""
        node = new_node(self.graph, "call_function", function, (value, *arguments))
        if (example := value.meta.get("example")) is not None:
            node.meta["example"] = Example(example.shape, dtype)
        return node

    def replace_observer(self, node: fx.Node, number: int) -> None:
        """Put quantize and dequantize in the place of ``node``, which hands its input through."""
        value = node.all_input_nodes[0]
        scale, zero_point = self.qparams_of(number, node)
        spec = self.plan.qparams[number]
        form = (spec.quant_min, spec.quant_max, spec.traits.dtype)
        with self.graph.inserting_before(node):
            quantized = self.call(ops.quantize_per_tensor, value, scale, zero_point, *form, dtype=spec.traits.dtype)
            result = self.call(ops.dequantize_per_tensor, quantized, scale, zero_point, dtype=torch.float32)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def quantize_weights(self) -> None:
        """Let every planned operator read integers; a weight that several operators read alike is stored once."""
        readers: dict[tuple[str, QParamsSpec], list[tuple[fx.Node, int]]] = {}
        for planned in self.plan.weights:
            reader = self.nodes[planned.node]
            source = _source(reader, planned.argument)
            readers.setdefault((str(source.target), planned.spec), []).append((reader, planned.argument))
        found = quantize_weights(
            [FloatWeight(name, get_attribute(self.prepared, name).detach(), spec) for name, spec in readers],
            self.stand_ins,
        )
        for weight, places in zip(found, readers.values(), strict=True):
            dequantize = self.store_weight(weight, _source(*places[0]))
            for reader, argument in places:
                reader.args = (*reader.args[:argument], dequantize, *reader.args[argument + 1 :])

    def store_weight(self, weight: IntegerWeight, source: fx.Node) -> fx.Node:
        """Keep integers in the place of a float weight, if that is nobody's any more, and return what dequantizes them.

        Their qparams stand beside them, at a name at which the user has nothing.
        """
        target = str(source.target)
        if target in self.read_as_float or not is_free(self.root, target):
            if target.rpartition(".")[0] in self.called:  # Lowering takes a module that is called as it is.
                target = target.replace(".", "_")
            target = free_target(f"{target}_int", self.prepared, self.root)
        set_tensor(self.root, target, weight.values)
        qparams = self.store_qparams(
            free_target(f"{target}_qparams", self.prepared, self.root), weight.scale, weight.zero_point, source
        )
        axis = () if weight.axis is None else (weight.axis,)
        dequantize = ops.dequantize_per_tensor if weight.axis is None else ops.dequantize_per_channel
        with self.graph.inserting_before(source):
            values = new_node(self.graph, "get_attr", target)
            values.meta["example"] = Example.of(weight.values)
            return self.call(dequantize, values, *qparams, *axis, dtype=torch.float32)

    def float_targets(self) -> set[str]:
        """The tensors that somebody goes on reading as they are, beside or instead of an operator on integers."""
        quantized = {(self.nodes[weight.node], weight.argument) for weight in self.plan.weights}
        found = set()
        for source in self.graph.nodes:
            if source.op == "get_attr":
                for user in source.users:
                    places = [(user, number) for number, argument in enumerate(user.args) if argument is source]
                    if not places or not quantized.issuperset(places):
                        found.add(str(source.target))
        return found

    def take_modules(self) -> None:
        """Copy the modules that the graph calls, before anything takes their place."""
        for target in sorted(self.called):
            owner, _, name = target.rpartition(".")
            module = copy.deepcopy(submodule(self.prepared, target), self.memo)
            place_for(self.root, owner)._modules[name] = module

    def take_attributes(self) -> None:
        """Copy what the graph still reads from the prepared model; its user may have given it other tensors."""
        for node in self.graph.nodes:
            if node.op != "get_attr":
                continue
            target = str(node.target)
            try:
                value = get_attribute(self.root, target)
            except AttributeError:
                value = copy.deepcopy(get_attribute(self.prepared, target), self.memo)
                set_tensor(self.root, target, value, is_persistent(self.prepared, target))
            if isinstance(value, Tensor):
                node.meta["example"] = Example.of(value)
