"""Observers: modules that watch tensors during calibration and say how to quantize them."""

from qcore.migration import explain_missing
from qcore.observer.base import DatalessObserver, ObserverBase, ObserverSpec, RangeObserver, StandIns
from qcore.observer.fixed import FixedQParamsObserver
from qcore.observer.histogram import HistogramObserver
from qcore.observer.min_max import MinMaxObserver, PerChannelMinMaxObserver
from qcore.observer.moving_average import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from qcore.observer.pair_limited import PAIR_LIMIT, PairLimitedPerChannelMinMaxObserver, largest_pair_sum
from qcore.observer.placeholder import PlaceholderObserver

__all__ = [
    "PAIR_LIMIT",
    "DatalessObserver",
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "ObserverSpec",
    "PairLimitedPerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "RangeObserver",
    "StandIns",
    "largest_pair_sum",
]


explain_missing(__name__)
