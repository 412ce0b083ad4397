"""BackendConfig: what a piece of hardware can do. The capability, as plain data.

A :class:`BackendConfig` lists :class:`BackendPatternConfig`: an operator, or a chain of operators that the hardware
computes as one, with the :class:`DTypeConfig` that it accepts. Operators may be written as a module class, a function
or a method name; qcore reads all forms of one operator as the same (``nn.ReLU``, ``F.relu``, ``"relu"``).
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Real
from typing import Any, Self

import torch
from torch import fx

from qcore.dtypes import (
    QScheme,
    canonical_dtype,
    canonical_qscheme,
    checked_scale,
    dtype_name,
    dtype_range,
    is_integer,
)
from qcore.errors import ConfigError, PluginError, Problems
from qcore.migration import HasNamesake, explain_missing

#: One operator (module class, function, method name), or a chain of them in the order of execution.
Pattern = Any


class ObservationType(Enum):
    """How an operator's output is quantized relative to its input."""

    OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT = 0
    OUTPUT_SHARE_OBSERVER_WITH_INPUT = 1
    INPUT_OUTPUT_NOT_OBSERVED = 2


@dataclass(frozen=True)
class DTypeWithConstraints:
    """A dtype, and what a kernel demands of the qparams.

    Args:
        dtype: ``None`` accepts any.
        quant_min_lower_bound: the smallest integer must not lie below.
        quant_max_upper_bound: the largest integer must not lie above.
        scale_min_lower_bound: the scale must not lie below; compared with the observer's ``eps``.
        scale_max_upper_bound: the scale must not lie above.
        scale_exact_match: the scale must be just this (fixed qparams).
        zero_point_exact_match: the zero point must be just this.
        qschemes: the schemes that the kernel takes; ``None`` accepts any.
        ch_axis: the channel axis that a per-channel scheme must use.

    Raises:
        ConfigError: no qparams could ever meet them; names all that is wrong.
    """

    dtype: torch.dtype | None = None
    quant_min_lower_bound: int | float | None = None
    quant_max_upper_bound: int | float | None = None
    scale_min_lower_bound: int | float | None = None
    scale_max_upper_bound: int | float | None = None
    scale_exact_match: float | None = None
    zero_point_exact_match: int | None = None
    qschemes: tuple[QScheme, ...] | None = None
    ch_axis: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", canonical_dtype(self.dtype))
        if self.qschemes is not None:
            object.__setattr__(self, "qschemes", tuple(canonical_qscheme(scheme) for scheme in self.qschemes))
        problems = self._wrong_numbers() or Problems(self._wrong_order())
        if problems:
            raise ConfigError([f"DTypeWithConstraints: {problem}" for problem in problems])

    @property
    def integers(self) -> tuple[float, float]:
        """The smallest and the largest integer to use; those of the dtype, or infinite, where nothing else is said."""
        lowest, highest = _dtype_range(self.dtype)
        low, high = self.quant_min_lower_bound, self.quant_max_upper_bound
        return lowest if low is None else low, highest if high is None else high

    @property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest scale; 0 and infinite where nothing is said."""
        least, most = self.scale_min_lower_bound, self.scale_max_upper_bound
        return 0.0 if least is None else least, math.inf if most is None else most

    def _wrong_numbers(self) -> Problems:
        problems = Problems()
        for name in ("quant_min_lower_bound", "quant_max_upper_bound", "zero_point_exact_match", "ch_axis"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and value % 1 == 0):
                problems.append(f"{name} must be a whole number, found {value!r}")
        for name in ("scale_min_lower_bound", "scale_max_upper_bound", "scale_exact_match"):
            if getattr(self, name) is not None:
                problems.of(checked_scale, getattr(self, name), name)
        return problems

    def _wrong_order(self) -> Iterator[str]:
        (low, high), (least, most) = self.integers, self.scales
        lowest, highest = _dtype_range(self.dtype)
        if not lowest <= low < high <= highest:
            yield f"the range {low}..{high} must hold two integers at least and fit {dtype_name(self.dtype)}"
        if self.zero_point_exact_match is not None and not low <= self.zero_point_exact_match <= high:
            yield f"zero_point_exact_match {self.zero_point_exact_match} lies outside the range {low}..{high}"
        if not least <= most:
            yield f"scale_min_lower_bound {least} lies above scale_max_upper_bound {most}"
        elif self.scale_exact_match is not None and not least <= self.scale_exact_match <= most:
            yield f"scale_exact_match {self.scale_exact_match} lies outside {least}..{most}"


def _dtype_range(dtype: torch.dtype | None) -> tuple[float, float]:
    return dtype_range(dtype) if dtype is not None and is_integer(dtype) else (-math.inf, math.inf)


@dataclass(frozen=True)
class DTypeConfig:
    """One combination of dtypes that a pattern accepts; ``None`` accepts any.

    Args:
        input_dtype: of the activations that go in.
        output_dtype: of the activation that comes out.
        weight_dtype: of the weight.
        bias_dtype: of the bias.
        is_dynamic: whether the input's range is taken at run time.
    """

    input_dtype: torch.dtype | DTypeWithConstraints | None = None
    output_dtype: torch.dtype | DTypeWithConstraints | None = None
    weight_dtype: torch.dtype | DTypeWithConstraints | None = None
    bias_dtype: torch.dtype | None = None
    is_dynamic: bool | None = None

    @functools.cached_property
    def input_constraints(self) -> DTypeWithConstraints:
        """The input's dtype and constraints."""
        return _with_constraints(self.input_dtype)

    @functools.cached_property
    def output_constraints(self) -> DTypeWithConstraints:
        """The output's dtype and constraints."""
        return _with_constraints(self.output_dtype)

    @functools.cached_property
    def weight_constraints(self) -> DTypeWithConstraints:
        """The weight's dtype and constraints."""
        return _with_constraints(self.weight_dtype)


def _with_constraints(dtype: torch.dtype | DTypeWithConstraints | None) -> DTypeWithConstraints:
    return dtype if isinstance(dtype, DTypeWithConstraints) else DTypeWithConstraints(dtype)


@dataclass(frozen=True)
class Condition:
    """A named test that narrows a pattern to some of its calls, such as depthwise convolutions.

    Args:
        name: as ``explain`` prints it.
        test: gets the node of the pattern's first operator, in normal form (see ``qcore.fx.operators``), whose
            ``meta["example"]`` tells the shape of every value.
    """

    name: str
    test: Callable[[fx.Node], bool]

    def holds(self, node: fx.Node) -> bool:
        """What the test says of a node.

        Raises:
            PluginError: it fails; its own error is chained.
        """
        try:
            return bool(self.test(node))
        except Exception as error:
            raise PluginError(
                f"the condition {self.name!r} of a backend's pattern failed on node {node.name!r} (a "
                f"{getattr(node.target, '__name__', node.target)}): {type(error).__name__}: {error}",
                hook="qcore_backend_config",
            ) from error


@dataclass(repr=False)
class BackendPatternConfig(HasNamesake):
    """What a backend accepts for one pattern. Every setter returns the config.

    Args:
        pattern: an operator, or a tuple of operators in the order of execution; in a chain, every operator reads the
            one before it, and nothing else does.
        observation_type: how the output is quantized relative to the input.
        dtype_configs: the combinations of dtypes that it accepts.
        condition: narrows the pattern to some of its calls.
    """

    pattern: Pattern | None = None
    observation_type: ObservationType = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    dtype_configs: list[DTypeConfig] = field(default_factory=list)
    condition: Condition | None = None

    def set_pattern(self, pattern: Pattern) -> Self:
        """The operator, or the chain of operators."""
        self.pattern = pattern
        return self

    def set_observation_type(self, observation_type: ObservationType) -> Self:
        """How the output is quantized relative to the input."""
        self.observation_type = observation_type
        return self

    def add_dtype_config(self, dtype_config: DTypeConfig) -> Self:
        """One more accepted combination; the first that accepts a qconfig is used."""
        self.dtype_configs.append(dtype_config)
        return self

    def set_dtype_configs(self, dtype_configs: Iterable[DTypeConfig]) -> Self:
        """All accepted combinations."""
        self.dtype_configs = list(dtype_configs)
        return self

    def set_condition(self, condition: Condition) -> Self:
        """Narrow the pattern; among configs of one pattern, those with a condition are tried first."""
        self.condition = condition
        return self

    def copy(self) -> "BackendPatternConfig":
        """One that can be changed without a change to this one."""
        return replace(self, dtype_configs=list(self.dtype_configs))

    def __hash__(self) -> int:
        return hash(repr(self.pattern))

    def __repr__(self) -> str:
        condition = f", condition={self.condition.name}" if self.condition else ""
        return f"BackendPatternConfig({self.pattern!r}{condition}, {len(self.dtype_configs)} dtype configs)"


@dataclass(repr=False)
class BackendConfig:
    """All patterns that a backend accepts. Every setter returns the config.

    Args:
        name: for messages.
    """

    name: str = ""
    _configs: dict[tuple[Any, str], BackendPatternConfig] = field(default_factory=dict, init=False)

    def set_name(self, name: str) -> Self:
        """The name, for messages."""
        self.name = name
        return self

    def set_backend_pattern_config(self, config: BackendPatternConfig) -> Self:
        """Add a pattern; it replaces one of the same pattern and condition.

        Raises:
            ConfigError: the config has no pattern, or accepts nothing.
        """
        problem = ""
        if not isinstance(config, BackendPatternConfig):
            problem = f"expected a qcore BackendPatternConfig, found {config!r}"
        elif config.pattern is None:
            problem = "a BackendPatternConfig without a pattern; call set_pattern"
        elif not isinstance(config.pattern, Hashable):
            problem = f"{config.pattern!r} is no pattern; a chain of operators is a tuple"
        elif not config.dtype_configs:
            problem = f"{config.pattern!r} accepts no dtypes; call add_dtype_config"
        if problem:
            raise ConfigError(f"BackendConfig {self.name!r}: {problem}")
        self._configs[(config.pattern, getattr(config.condition, "name", ""))] = config
        return self

    def set_backend_pattern_configs(self, configs: Iterable[BackendPatternConfig]) -> Self:
        """Add several patterns."""
        for config in configs:
            self.set_backend_pattern_config(config)
        return self

    def copy(self) -> "BackendConfig":
        """One that can be changed, and whose patterns can, without a change to this one."""
        return BackendConfig(self.name).set_backend_pattern_configs(config.copy() for config in self.configs)

    @property
    def configs(self) -> list[BackendPatternConfig]:
        """The patterns, in the order in which they were added."""
        return list(self._configs.values())

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"BackendConfig({self.name!r}, {len(self._configs)} patterns)"


explain_missing(__name__)
