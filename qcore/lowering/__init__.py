"""Lowering: from a reference model to one on a backend's kernels."""

from qcore.lowering.engine import EngineCall, lower_with_engine
from qcore.lowering.lowered import Lowered
from qcore.lowering.qparams import QParams, QuantizedWeight
from qcore.lowering.rules import BoundaryBuilder, Declined, LoweringRule, QuantizedCall, lower_with_rules

__all__ = [
    "BoundaryBuilder",
    "Declined",
    "EngineCall",
    "Lowered",
    "LoweringRule",
    "QParams",
    "QuantizedCall",
    "QuantizedWeight",
    "lower_with_engine",
    "lower_with_rules",
]
