"""Observers: modules that watch tensors during calibration and say how to quantize them."""

from typing import TYPE_CHECKING

from qcore.migration import missing_from
from qcore.observer.base import DatalessObserver, ObserverBase, ObserverSpec, RangeObserver
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
]


if not TYPE_CHECKING:
    __getattr__ = missing_from(__name__)
