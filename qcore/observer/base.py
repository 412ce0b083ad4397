"""What every observer is: a module that watches a tensor pass and says how to quantize it.

An observer returns its input unchanged. ``calculate_qparams`` turns what it saw into a scale and a zero point.
Observers are written into a qconfig as constructors, never as instances: :class:`ObserverSpec` is such a
constructor, and unlike a ``functools.partial`` it compares, hashes, pickles and prints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcore import ops
from qcore.dtypes import (
    QScheme,
    canonical_dtype,
    canonical_qscheme,
    checked_integer,
    checked_scale,
    dtype_name,
    dtype_range,
    is_integer,
)
from qcore.errors import ConfigError


@dataclass(frozen=True)
class ObserverSpec:
    """An observer class with arguments bound: ``MinMaxObserver.with_args(dtype=torch.int8)``.

    Attributes:
        observer: the class.
        arguments: keyword arguments, as sorted pairs.
    """

    observer: type["ObserverBase"]
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, **overrides: Any) -> "ObserverBase":
        """A new observer; ``overrides`` win over the bound arguments."""
        return self.observer(**{**dict(self.arguments), **overrides})

    def with_args(self, **arguments: Any) -> "ObserverSpec":
        """The same spec with more arguments bound."""
        merged = {**dict(self.arguments), **arguments}
        return ObserverSpec(self.observer, tuple(sorted(merged.items())))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.observer.__name__}({arguments})"


class ObserverBase(nn.Module):
    """Base of all observers.

    Args:
        dtype: integer dtype of the quantized tensor (``torch.quint8`` and ``torch.qint8`` are read as the plain ones).
        qscheme: a :class:`~qcore.dtypes.QScheme` or torch's scheme of that name.
        reduce_range: leave one bit out (0..127 rather than 0..255), for kernels whose 16-bit sums would saturate.
        quant_min: smallest integer to use; ``None`` leaves it to the backend (the whole dtype, unless a kernel
            declares a narrower range).
        quant_max: largest integer to use.
        eps: smallest scale; ``None`` leaves it to the backend (no floor but float32's smallest normal number).
        is_dynamic: whether the range is taken at run time from each tensor.

    Raises:
        ConfigError: the dtype isn't an integer one, the range doesn't fit it, or ``eps`` can't be a scale.
    """

    dtype: torch.dtype
    qscheme: QScheme
    reduce_range: bool
    quant_min: int
    quant_max: int
    eps: float | None
    is_dynamic: bool
    has_explicit_range: bool

    #: The axis of the channels, of an observer that has any.
    ch_axis: int | None = None

    #: Whether what it finds for a channel depends on that channel alone, but that a channel of zeros may take the scale
    #: of its neighbours; then ``convert_fx`` may show it the channels of several weights at once.
    treats_channels_apart = False

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: object = QScheme.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__()
        # Past a module's __setattr__, which asks of each value whether it is a parameter, a module or a buffer: a
        # network has an observer behind most of its operators.
        own = vars(self)
        own["dtype"] = canonical_dtype(dtype)
        own["qscheme"] = canonical_qscheme(qscheme)
        own["reduce_range"] = reduce_range
        own["eps"] = None if eps is None else checked_scale(eps, f"{type(self).__name__}: eps")
        own["is_dynamic"] = is_dynamic
        own["quant_min"], own["quant_max"], own["has_explicit_range"] = self._choose_range(quant_min, quant_max)

    def _choose_range(self, quant_min: int | None, quant_max: int | None) -> tuple[int, int, bool]:
        if not is_integer(self.dtype):
            return 0, 0, False  # A placeholder for a float dtype: there is no range to choose.
        lowest, highest = dtype_range(self.dtype)
        if quant_min is None and quant_max is None:
            return (lowest // 2, highest // 2, True) if self.reduce_range else (lowest, highest, False)
        kind = type(self).__name__
        if quant_min is None or quant_max is None:
            raise ConfigError(f"{kind}: quant_min={quant_min} and quant_max={quant_max} must be given together")
        if self.reduce_range:
            raise ConfigError(f"{kind}: give reduce_range=True or quant_min and quant_max, not both")
        low, high = checked_integer(quant_min, f"{kind}: quant_min"), checked_integer(quant_max, f"{kind}: quant_max")
        if not (lowest <= low <= 0 <= high <= highest and low < high):
            limits = f"{dtype_name(self.dtype)} ({lowest}..{highest})"
            raise ConfigError(f"{kind}: the range {low}..{high} must hold 0 and fit {limits}")
        return low, high, True

    @classmethod
    def with_args(cls, **arguments: Any) -> ObserverSpec:
        """A constructor of this observer with ``arguments`` bound, for use in a QConfig."""
        return ObserverSpec(cls).with_args(**arguments)

    @property
    def has_data(self) -> bool:
        """Whether the observer knows enough to give qparams."""
        raise NotImplementedError(f"{type(self).__name__} must define has_data")

    @property
    def nonfinite_count(self) -> int:
        """How many NaN or infinite values came past; they don't enter the range."""
        return 0

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale (float32) and the zero point (int64): 0-d, or one entry for each channel."""
        raise NotImplementedError(f"{type(self).__name__} gives no qparams")

    @classmethod
    def calculate_all(cls, observers: Sequence["ObserverBase"]) -> list[tuple[Tensor, Tensor]]:
        """What ``calculate_qparams`` gives for each of several observers of this class.

        ``convert_fx`` asks for all at once; an observer whose work is less for many together overrides it.

        Args:
            observers: all of this very class.
        """
        return [observer.calculate_qparams() for observer in observers]

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` as integers with the observer's qparams, each value rounded to the nearest step.

        ``convert_fx`` calls it for weights; an observer that knows a better rounding for them overrides it.

        Args:
            x: float32, of any shape.

        Returns:
            A tensor of ``self.dtype`` and the shape of ``x``.
        """
        scale, zero_point = self.calculate_qparams()
        axis = (self.ch_axis or 0,) if self.qscheme.per_channel else ()
        operator = ops.quantize_per_channel if axis else ops.quantize_per_tensor
        return operator(x, scale, zero_point, *axis, self.quant_min, self.quant_max, self.dtype)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Look at ``x`` and return it unchanged."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def extra_repr(self) -> str:
        """The dtype, scheme and range, for printing."""
        return f"{dtype_name(self.dtype)} {self.qscheme.value} {self.quant_min}..{self.quant_max}"


class RangeObserver(ObserverBase):
    """An observer that keeps a smallest and a largest value; what it does with them is the same for all.

    Attributes:
        min_val: smallest value, ``inf`` before any data; 0-d, or one for each channel.
        max_val: largest value, ``-inf`` before any data.
        nonfinite: number of NaN and infinite values that came past.
    """

    min_val: Tensor
    max_val: Tensor
    nonfinite: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        low, high = (torch.tensor(end, dtype=torch.float32) for end in (math.inf, -math.inf))
        self._buffers.update(min_val=low, max_val=high, nonfinite=torch.tensor(0))

    @property
    def has_data(self) -> bool:
        """Whether any finite value was seen."""
        return bool((self.min_val <= self.max_val).all())

    @property
    def nonfinite_count(self) -> int:
        """How many NaN or infinite values came past."""
        return int(self.nonfinite)

    def finite(self, x: Tensor) -> tuple[Tensor, float, float] | None:
        """``x`` in float32 as one row without NaN and infinity, with its extremes; counts what it leaves out.

        Reading the two extremes is all that waits for the device, unless something has to be left out.

        Returns:
            ``(values, smallest, largest)``, the values in the order of memory, or ``None`` if nothing finite is left.
        """
        if x.numel() == 0:
            return None
        values = in_memory_order(x.detach()).to(torch.float32)
        smallest, largest = (extreme.item() for extreme in torch.aminmax(values))
        if math.isfinite(smallest) and math.isfinite(largest):  # NaN and infinity come through aminmax.
            return values, smallest, largest
        kept = values[torch.isfinite(values)]
        self.nonfinite += values.numel() - kept.numel()
        return self.finite(kept)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest finite value of ``x``, 0-d or one for each channel; ``None`` if there is none."""
        seen = self.finite(x)
        return None if seen is None else self.min_val.new_tensor(seen[1:]).unbind()  # type: ignore[return-value]

    def update(self, smallest: Tensor, largest: Tensor) -> None:
        """Widen the range until it holds two extremes."""
        self.min_val = torch.minimum(self.min_val, smallest)
        self.max_val = torch.maximum(self.max_val, largest)

    def forward(self, x: Tensor) -> Tensor:
        """Update the range by ``x`` (any shape, floating dtype) and return ``x``."""
        extremes = self.extremes(x)
        if extremes is not None:
            self.update(*extremes)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the range seen so far, as torch computes them from a minimum and a maximum."""
        return qparams_from_range(
            self.min_val, self.max_val, self.quant_min, self.quant_max, self.dtype, self.qscheme, self.eps
        )

    def reset_min_max_vals(self) -> None:
        """Forget what was seen."""
        self.min_val = torch.full_like(self.min_val, math.inf)
        self.max_val = torch.full_like(self.max_val, -math.inf)
        self.nonfinite.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A buffer may get its shape from the first tensor, such as the number of its channels.
        for name, fresh in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and fresh is not None:
                self._buffers[name] = torch.empty_like(saved, device=fresh.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def in_memory_order(x: Tensor) -> Tensor:
    """The values as one row, without a copy for any dense layout: extremes and histograms don't care for the order."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def qparams_from_range(
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    qscheme: QScheme,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``min_val``..``max_val`` and represent zero exactly.

    Bit for bit what torch's ``UniformQuantizationObserverBase._calculate_qparams`` gives, but for its floor of
    float32's epsilon under every scale, which flushes tensors below 1e-7 to zero; here the floor is ``eps``, or
    none. An empty range can be represented by any scale: it gets that of its largest neighbour, or 1.

    Args:
        min_val: smallest values, 0-d or one for each channel.
        max_val: largest values, same shape.
        quant_min: integer that the smallest value maps to.
        quant_max: integer that the largest value maps to.
        dtype: integer dtype.
        qscheme: affine or symmetric.
        eps: smallest scale.

    Returns:
        Scale (float32) and zero point (int64), of the shape of ``min_val``.
    """
    low = torch.clamp(min_val.to(torch.float32), max=0.0)
    high = torch.clamp(max_val.to(torch.float32), min=0.0)
    if qscheme.symmetric:
        high = torch.maximum(-low, high)
        scale = high / (float(quant_max - quant_min) / 2)
        zero_point = torch.full_like(scale, symmetric_zero_point(dtype, quant_min, quant_max), dtype=torch.int64)
        return _without_zeros(scale, eps), zero_point
    steps = float(quant_max - quant_min)
    scale = (high - low) / steps
    # The width of a range may exceed what float32 holds although its step doesn't.
    scale = _without_zeros(torch.where(torch.isinf(scale), high / steps - low / steps, scale), eps)
    zero_point = quant_min - torch.round(low / scale).to(torch.int64)
    return scale, torch.clamp(zero_point, quant_min, quant_max)


def symmetric_zero_point(dtype: torch.dtype, quant_min: int, quant_max: int) -> int:
    """The integer that stands for zero in a symmetric scheme, as torch chooses it."""
    if dtype != torch.uint8:
        return 0
    return 128 if (quant_min, quant_max) == dtype_range(dtype) else (quant_min + quant_max) // 2


def _without_zeros(scale: Tensor, eps: float | None) -> Tensor:
    limits = torch.finfo(torch.float32)
    if eps is None and scale.numel():
        largest = scale.max()
        scale = torch.where(scale > 0, scale, torch.where(largest > 0, largest, 1.0))
    return torch.clamp(scale, limits.tiny if eps is None else eps, limits.max)


#: A backend's observers, by the class that each stands in for.
StandIns = Mapping[type[ObserverBase], type[ObserverBase]]


class DatalessObserver(ObserverBase):
    """Base for observers whose qparams don't depend on data: they are always ready."""

    @property
    def has_data(self) -> bool:
        """Always true: there is nothing to wait for."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x
