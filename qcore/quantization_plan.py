"""QuantizationPlan: what qcore decided for every operator, and why. The answer, as plain data.

``prepare_fx`` makes the plan and keeps it on the model; the passes after it only carry it out. ``explain(model)``
returns it, and printing it shows a table.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qcore.backend_config import DTypeConfig
from qcore.dtypes import dtype_name
from qcore.qconfig import ObserverConstructor, ObserverTraits, QConfig
from qcore.table import natural_width, paragraph, table

_HEADER = ("operator", "where", "runs in", "by rule", "how, or why not")

#: In a table that is too wide, longer reasons than this are numbers.
_LONG_REASON = 24


@dataclass(frozen=True)
class Decision:
    """What becomes of one matched operator, or chain of operators.

    Attributes:
        node: name of the node that gives the result.
        nodes: names of all nodes of the chain, in the order of execution.
        operators: their operators' names; a clamp goes by that of the activation that it is, such as ``relu``.
        path: path of the module that the first of them stands for or is called in.
        quantized: whether it is computed on integers.
        rule: the rule of the mapping that chose its qconfig; empty if none did.
        qconfig: the qconfig.
        dtype_config: the backend's dtype config that accepted the qconfig.
        condition: the condition of the backend's pattern, such as ``depthwise``.
        reason: why it stays float; empty if it doesn't.
        kernel: what computes it after lowering; empty before.
        multiply_adds: that it makes on the example inputs.
        weights: numbers in its weight.
    """

    node: str
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    path: str
    quantized: bool
    rule: str
    qconfig: QConfig | None = None
    dtype_config: DTypeConfig | None = None
    condition: str = ""
    reason: str = ""
    kernel: str = ""
    multiply_adds: int = 0
    weights: int = 0


@dataclass(frozen=True)
class QParamsSpec:
    """One set of qparams: the observer that finds them, with the range that all who read and write them can take.

    Attributes:
        constructor: of the observer.
        traits: what that constructor's observers have in common.
        quant_min: smallest integer.
        quant_max: largest integer.
        eps: smallest scale that a kernel demands.
        fixed: scale and zero point that a kernel demands.
        scale_max: largest scale that a kernel takes; known to be kept only when the data is in.
    """

    constructor: ObserverConstructor
    traits: ObserverTraits
    quant_min: int
    quant_max: int
    eps: float | None = None
    fixed: tuple[float, int] | None = None
    scale_max: float | None = None


@dataclass(frozen=True)
class Observation:
    """A place where an observer stands.

    Attributes:
        value: name of the node whose output it watches.
        qparams: which it finds, by number; the same number at several places means the same observer.
        readers: the nodes that read the quantized value; ``None`` means all.
    """

    value: str
    qparams: int
    readers: tuple[str, ...] | None


@dataclass(frozen=True)
class WeightQuantization:
    """How one weight of an operator is quantized.

    Attributes:
        node: name of the operator's node.
        argument: position of the weight among its arguments.
        spec: of its qparams.
    """

    node: str
    argument: int
    spec: QParamsSpec


@dataclass(frozen=True)
class PythonModule:
    """A module that stays Python, because it can't be a graph.

    Attributes:
        path: of the module; ``""`` is the model itself.
        type_name: its class.
        reason: why it can't.
        location: the source line that stands in the way, if it is known.
        culprit: path of the module whose forward holds that line.
    """

    path: str
    type_name: str
    reason: str
    location: str | None = None
    culprit: str = ""

    def __str__(self) -> str:
        at = f" at {self.location}" if self.location else ""
        line = f"{self.path or 'the model'} ({self.type_name}) stays Python: {self.reason}{at}"
        if self.culprit in ("", self.path):
            return line
        return (
            f"{line}; to trace around {self.culprit}, keep it whole with "
            f"PrepareCustomConfig().set_non_traceable_module_names([{self.culprit!r}])"
        )


@dataclass(frozen=True)
class QuantizationPlan:
    """All decisions for a model, and all that the passes need to carry them out.

    Attributes:
        backend: name of the backend that the plan is made for.
        decisions: one for each operator or chain, in the order of execution.
        qparams: the sets of qparams, by number.
        observations: where observers stand, in the order of execution.
        shared: nodes whose output has the qparams of their input, with the number of those.
        absorbed: clamps that the quantize after them makes needless, with the node whose output is quantized there.
        weights: the weights to quantize.
        dynamic: operators whose input takes its qparams at run time, with the range of the integers.
        observers: names of the observers in the prepared model, by number of the qparams; in what ``explain`` gives.
        notes: what came up later, such as NaN in calibration; likewise.
        parts: paths of the modules that are graphs; empty if the whole model is one.
        python: the modules that stay Python.
        other_weights: weights that no decision speaks of, as what reads them stays Python.
    """

    backend: str
    decisions: tuple[Decision, ...]
    qparams: tuple[QParamsSpec, ...] = ()
    observations: tuple[Observation, ...] = ()
    shared: Mapping[str, int] = field(default_factory=dict)
    absorbed: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[WeightQuantization, ...] = ()
    dynamic: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    observers: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    python: tuple[PythonModule, ...] = ()
    other_weights: int = 0

    @property
    def quantized(self) -> tuple[Decision, ...]:
        """The decisions for operators that are computed on integers."""
        return tuple(decision for decision in self.decisions if decision.quantized)

    @property
    def floating(self) -> tuple[Decision, ...]:
        """The decisions for operators that stay float."""
        return tuple(decision for decision in self.decisions if not decision.quantized)

    @property
    def multiply_add_share(self) -> float:
        """The share of multiply-adds that are made on integers, of those in graphs; 1 if there are none."""
        total = sum(decision.multiply_adds for decision in self.decisions)
        return sum(decision.multiply_adds for decision in self.quantized) / total if total else 1.0

    @property
    def weight_share(self) -> float:
        """The share of the weights (parameters that operators and leaf modules multiply or look up) that are integers.

        1 if there are none.
        """
        total = sum(decision.weights for decision in self.decisions) + self.other_weights
        return sum(decision.weights for decision in self.quantized) / total if total else 1.0

    def summary(self) -> str:
        """One line: how many operators went to integers, and how many stayed float for which reason."""
        reasons = Counter(decision.reason for decision in self.floating)
        return self._head() + "".join(f"; {count} float: {reason}" for reason, count in reasons.most_common())

    def _head(self) -> str:
        total, quantized = len(self.decisions), len(self.quantized)
        shares = f"{self.multiply_add_share:.0%} of multiply-adds, {self.weight_share:.0%} of weights"
        return f"{self.backend}: {quantized} of {total} operators on integers ({shares})"

    def __str__(self) -> str:
        """The table, as wide as the terminal."""
        return self.as_text(max(60, shutil.get_terminal_size((100, 24)).columns))

    def as_text(self, width: int) -> str:
        """A table of all decisions, with the summary above.

        Args:
            width: of a line; a long reason stands above the table, and is a number within.
        """
        rows = [_row(decision) for decision in self.decisions]
        reasons = Counter(decision.reason for decision in self.floating)
        others = dict.fromkeys(row[-1] for row in rows if row[-1] not in reasons and len(row[-1]) > _LONG_REASON)
        is_wide = natural_width([_HEADER, *rows]) > width
        long = [text for text in (*reasons, *others) if is_wide and len(text) > _LONG_REASON]
        mark = {text: f"({number})" for number, text in enumerate(long, 1)}
        head = [self._head()]
        head += [f"  {count} float: {reason} {mark.get(reason, '')}".rstrip() for reason, count in reasons.items()]
        head += [f"  {mark[text]} {text}" for text in others if text in mark]
        head += [str(module) for module in self.python]
        if self.python:
            head.append(f"graphs: {', '.join(self.parts) or 'none'}")
        shown = [(*row[:-1], mark.get(row[-1], row[-1])) for row in rows]
        return "\n".join(
            [
                *(line for text in head for line in paragraph(text, width)),
                "",
                *table(_HEADER, shown, width),
                *(line for note in self.notes for line in paragraph(f"note: {note}", width)),
            ]
        )


def joined_plan(plans: Mapping[str, QuantizationPlan]) -> QuantizationPlan:
    """The plan of a model, of those of its graphs and that of what stays Python around them.

    Args:
        plans: by path in the model.

    Returns:
        The only one if there is one; else one to read, not to carry out: its qparams stay with the graphs.
    """
    if len(plans) == 1:
        return next(iter(plans.values()))
    graphs = {path: plan for path, plan in plans.items() if not plan.python}
    every = [*graphs.values(), *(plan for plan in plans.values() if plan.python)]
    return QuantizationPlan(
        backend=every[0].backend,
        decisions=tuple(decision for plan in every for decision in plan.decisions),
        notes=tuple(f"{path}: {note}" for path, plan in graphs.items() for note in plan.notes),
        parts=tuple(graphs),
        python=tuple(module for plan in every for module in plan.python),
        other_weights=sum(plan.other_weights for plan in every),
    )


def _row(decision: Decision) -> tuple[str, str, str, str, str]:
    operators = " + ".join(decision.operators)
    if decision.condition:
        operators += f" [{decision.condition}]"
    if not decision.quantized:
        return operators, decision.path or decision.node, "float", decision.rule or "-", decision.reason
    config = decision.dtype_config
    dtypes = ""
    if config is not None:
        dtypes = f"{dtype_name(config.input_constraints.dtype)} -> {dtype_name(config.output_constraints.dtype)}"
        if config.weight_dtype is not None:
            dtypes += f", weight {dtype_name(config.weight_constraints.dtype)}"
    how = decision.kernel or decision.reason or "reference"
    return operators, decision.path or decision.node, dtypes or "integers", decision.rule, how
