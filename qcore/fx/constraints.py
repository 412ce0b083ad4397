"""What a dtype config demands of an observer, and the qparams that result from both."""

import torch

from qcore.backend_config import DTypeConfig, DTypeWithConstraints
from qcore.dtypes import dtype_name
from qcore.qconfig import ObserverConstructor, ObserverTraits
from qcore.quantization_plan import QParamsSpec


def gives_float(dtype_config: DTypeConfig) -> bool:
    """Whether a kernel turns integers into float by itself."""
    return dtype_config.output_constraints.dtype == torch.float32


def reads_float(dtype_config: DTypeConfig) -> bool:
    """Whether a kernel reads float: it takes the range at run time, or only its weight is quantized."""
    return bool(dtype_config.is_dynamic) or dtype_config.input_constraints.dtype == torch.float32


def bounds_within(traits: ObserverTraits, constraints: DTypeWithConstraints) -> tuple[int, int]:
    """The range of integers that an observer and a kernel both take."""
    low, high = constraints.quant_min_lower_bound, constraints.quant_max_upper_bound
    return (
        traits.quant_min if low is None else max(traits.quant_min, int(low)),
        traits.quant_max if high is None else min(traits.quant_max, int(high)),
    )


def scale_bounds(constraints: DTypeWithConstraints) -> tuple[float | None, float | None]:
    """The smallest and the largest scale that a kernel takes."""
    bounds = (constraints.scale_min_lower_bound, constraints.scale_max_upper_bound)
    low, high = (None if bound is None else float(bound) for bound in bounds)
    return low, high


def constrained(
    constructor: ObserverConstructor, traits: ObserverTraits, constraints: DTypeWithConstraints
) -> QParamsSpec:
    """The qparams that an observer finds within a kernel's constraints; what the user left open, they fill in."""
    low, high = bounds_within(traits, constraints)
    fixed = traits.fixed
    if constraints.scale_exact_match is not None and constraints.zero_point_exact_match is not None:
        fixed = (constraints.scale_exact_match, constraints.zero_point_exact_match)
    eps, scale_max = scale_bounds(constraints)
    return QParamsSpec(constructor, traits, low, high, eps, fixed, scale_max)


def violation(side: str, traits: ObserverTraits, constraints: DTypeWithConstraints, fixes_count: bool) -> str | None:
    """What in an observer's traits a kernel doesn't take; what the user left open is no violation.

    Args:
        side: ``"input"``, ``"output"`` or ``"weight"``, for the message.
        traits: of the observer.
        constraints: of the kernel.
        fixes_count: whether demands for an exact scale and zero point are to be compared.
    """
    found, wanted = traits.dtype, constraints.dtype
    if wanted is not None and found != wanted:
        return f"{side} dtype {dtype_name(found)}, it takes {dtype_name(wanted)}"
    if constraints.qschemes is not None and traits.qscheme not in constraints.qschemes:
        offered = " or ".join(scheme.value for scheme in constraints.qschemes)
        return f"{side} {traits.qscheme.value}, it takes {offered}"
    if constraints.ch_axis is not None and traits.ch_axis not in (None, constraints.ch_axis):
        return f"{side} ch_axis {traits.ch_axis}, it takes {constraints.ch_axis}"
    if traits.has_explicit_range:
        low, high = constraints.quant_min_lower_bound, constraints.quant_max_upper_bound
        if low is not None and traits.quant_min < low:
            return f"{side} quant_min {traits.quant_min} < {low} (quant_min_lower_bound)"
        if high is not None and traits.quant_max > high:
            return f"{side} quant_max {traits.quant_max} > {high} (quant_max_upper_bound)"
    floor = constraints.scale_min_lower_bound
    if floor is not None and traits.eps is not None and traits.eps < floor:
        return f"{side} eps {traits.eps} < {floor} (scale_min_lower_bound)"
    if fixes_count and traits.fixed is not None:
        scale, zero_point = constraints.scale_exact_match, constraints.zero_point_exact_match
        if scale is not None and traits.fixed[0] != scale:
            return f"{side} scale {traits.fixed[0]}, it takes exactly {scale}"
        if zero_point is not None and traits.fixed[1] != zero_point:
            return f"{side} zero point {traits.fixed[1]}, it takes exactly {zero_point}"
    return None
