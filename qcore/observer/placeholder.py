"""Says a dtype and nothing else: for dynamic quantization and for operators that stay in another float dtype."""

from qcore.observer.base import DatalessObserver


class PlaceholderObserver(DatalessObserver):
    """Records a dtype; watches nothing and gives no qparams.

    Args:
        arguments: see :class:`~qcore.observer.base.ObserverBase`; ``dtype`` may be a float dtype here.
    """
