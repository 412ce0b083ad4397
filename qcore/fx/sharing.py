"""A part that backends' tables have in common: operators whose output lies in the range of their input."""

from torch import fx

from qcore.backend_config import BackendPatternConfig, Condition, DTypeConfig, ObservationType
from qcore.fx.operators import CLAMP, INTERPOLATE, MOVE_OPERATORS


def _is_mean(interpolate: fx.Node) -> bool:
    return interpolate.args[3] != "bicubic"


#: Interpolation that gives means of what it reads; bicubic overshoots, so its output has a range of its own.
NOT_BICUBIC = Condition("not bicubic", _is_mean)


def sharing_patterns(dtype_config: DTypeConfig) -> list[BackendPatternConfig]:
    """Every operator that hands on its input's qparams: those that move elements, clamps and interpolation.

    Bicubic interpolation isn't among them; a backend that takes it lists ``INTERPOLATE`` with its other operators.

    Args:
        dtype_config: what the backend accepts for them.
    """
    patterns = [BackendPatternConfig(operator) for operator in (*MOVE_OPERATORS, CLAMP)]
    patterns.append(BackendPatternConfig(INTERPOLATE).set_condition(NOT_BICUBIC))
    return [
        pattern.set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT).add_dtype_config(dtype_config)
        for pattern in patterns
    ]
