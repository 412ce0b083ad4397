"""Converted graphs on torch's native operators: what a backend's ``qcore_lower`` makes of a table of rules."""

from collections.abc import Sequence

import torch

from qcore.fx.graph_module import QGraphModule
from qcore.lowering import BoundaryBuilder, Lowered, LoweringRule, lower_with_rules
from qcore_torch_kernels.kernel import KernelModule
from qcore_torch_kernels.replay.executor import Executor


class ReplayedGraph(QGraphModule):
    """A converted graph whose calls are recorded, and replayed without Python between their operators."""

    _runner_class = Executor


def replayed_kinds(graph: QGraphModule) -> int:
    """For how many kinds of calls (shapes, strides, dtypes) a converted graph has a recording to replay."""
    runner = vars(graph).get("_runner")
    return runner.replayed_kinds if isinstance(runner, Executor) else 0


def lower(
    reference: QGraphModule, rules: Sequence[LoweringRule], *, enter: BoundaryBuilder, leave: BoundaryBuilder
) -> Lowered:
    """Lower by a table of rules, to a graph that is replayed; arguments as of ``lower_with_rules``."""
    lowered = lower_with_rules(reference, rules, enter=enter, leave=leave, graph_class=ReplayedGraph)
    with torch.inference_mode(False):
        counter = torch.empty(0)  # One for all kernels: at each call a single number tells whether any state changed.
    for kernel in lowered.module.modules():
        if isinstance(kernel, KernelModule):
            kernel.share_counter(counter)
    return lowered
