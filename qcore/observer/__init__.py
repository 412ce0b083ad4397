"""Observers: modules that watch tensors during calibration and say how to quantize them."""

from qcore.migration import explain_missing
from qcore.observer.base import DatalessObserver, ObserverBase, ObserverSpec, RangeObserver, StandIns
from qcore.observer.fixed import FixedQParamsObserver
from qcore.observer.histogram import HistogramObserver
from qcore.observer.min_max import MinMaxObserver, PerChannelMinMaxObserver
from qcore.observer.moving_average import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from qcore.observer.placeholder import PlaceholderObserver

__all__ = [
    "DatalessObserver",
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "ObserverSpec",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "RangeObserver",
    "StandIns",
]


explain_missing(__name__)
