"""QConfig: how one operator is to be quantized, as a pair of observer constructors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qcore.dtypes import QScheme
from qcore.errors import ConfigError, Problems
from qcore.migration import explain_missing
from qcore.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    ObserverBase,
    ObserverSpec,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

ObserverConstructor = Callable[..., ObserverBase]


@dataclass(frozen=True)
class QConfig:
    """Observers for an operator's activations and for its weight.

    Args:
        activation: constructor of the activation observer: an observer class, or ``SomeObserver.with_args(...)``.
        weight: constructor of the weight observer.

    Raises:
        ConfigError: an observer instance was given where a constructor is expected.
    """

    activation: ObserverConstructor
    weight: ObserverConstructor

    def __post_init__(self) -> None:
        problems = Problems()
        for field in ("activation", "weight"):
            value = getattr(self, field)
            if isinstance(value, nn.Module):
                kind = type(value).__name__
                problems.append(
                    f"QConfig({field}=...) got an instance of {kind}, which all operators would share; give the "
                    f"constructor: {field}={kind}.with_args(...) or {field}={kind}"
                )
            elif not callable(value):
                problems.append(f"QConfig({field}=...) needs an observer constructor, found {value!r}")
        problems.raise_any()


@dataclass(frozen=True)
class ObserverTraits:
    """What a constructor's observers have in common; read once from one of them.

    Attributes:
        dtype: dtype of the quantized tensor.
        qscheme: scheme.
        ch_axis: channel axis of a per-channel observer, else ``None``.
        quant_min: smallest integer.
        quant_max: largest integer.
        has_explicit_range: whether the user chose the range (a backend may narrow one that nobody chose).
        eps: smallest scale that the user chose.
        is_dynamic: whether the range is taken at run time.
        fixed: scale and zero point, when they don't depend on data.
        is_placeholder: whether it gives no qparams at all.
    """

    dtype: torch.dtype
    qscheme: QScheme
    ch_axis: int | None
    quant_min: int
    quant_max: int
    has_explicit_range: bool
    eps: float | None
    is_dynamic: bool
    fixed: tuple[float, int] | None
    is_placeholder: bool


def observer_traits(constructor: ObserverConstructor) -> ObserverTraits:
    """Build one observer and read its traits.

    Raises:
        ConfigError: it can't be built, or isn't an observer.
    """
    try:
        observer = constructor()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{constructor!r} can't be built without arguments: {error}") from error
    if not isinstance(observer, ObserverBase):
        found = f"{type(observer).__module__}.{type(observer).__name__}"
        raise ConfigError(
            f"{constructor!r} builds a {found}, which isn't a qcore observer; import the observer from qcore.observer"
        )
    # Only a class or a spec can be told a range by the backend; what any other constructor builds, it has chosen.
    is_open = spec_of(constructor) is not None and not observer.has_explicit_range
    fixed = (observer.scale, observer.zero_point) if isinstance(observer, FixedQParamsObserver) else None
    same = ("dtype", "qscheme", "ch_axis", "quant_min", "quant_max", "eps", "is_dynamic")
    return ObserverTraits(
        **{name: getattr(observer, name) for name in same},
        has_explicit_range=not is_open,
        fixed=fixed,
        is_placeholder=isinstance(observer, PlaceholderObserver),
    )


def spec_of(constructor: ObserverConstructor) -> ObserverSpec | None:
    """A class or a spec as a spec; ``None`` for any other constructor, which can't be told anything."""
    if isinstance(constructor, ObserverSpec):
        return constructor
    if isinstance(constructor, type) and issubclass(constructor, ObserverBase):
        return ObserverSpec(constructor)
    return None


default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_histogram_observer = HistogramObserver.with_args()
default_weight_observer = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=QScheme.per_channel_symmetric
)
default_placeholder_observer = PlaceholderObserver.with_args(dtype=torch.float32)

default_qconfig = QConfig(activation=default_observer, weight=default_weight_observer)
default_per_channel_qconfig = QConfig(activation=default_observer, weight=default_per_channel_weight_observer)
#: Activations take the range of each batch at run time, where one range for all batches costs too much accuracy.
default_dynamic_qconfig = QConfig(
    activation=PlaceholderObserver.with_args(dtype=torch.uint8, is_dynamic=True),
    weight=default_per_channel_weight_observer,
)
#: Activations stay float; weights are stored as integers and dequantized at each call.
default_weight_only_qconfig = QConfig(
    activation=default_placeholder_observer, weight=default_per_channel_weight_observer
)


explain_missing(__name__)
