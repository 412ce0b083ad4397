"""What a dtype config demands of an observer, and the qparams that result from both."""

import torch

from qcore.backend_config import DTypeConfig, DTypeWithConstraints
from qcore.dtypes import dtype_name
from qcore.qconfig import ObserverConstructor, ObserverTraits
from qcore.quantization_plan import QParamsSpec


def gives_float(dtype_config: DTypeConfig) -> bool:
    """Whether a kernel's result is float: it turns integers into float by itself, or reads float."""
    return reads_float(dtype_config) or dtype_config.output_constraints.dtype == torch.float32


def reads_float(dtype_config: DTypeConfig) -> bool:
    """Whether a kernel reads float: it takes the range at run time, or only its weight is quantized."""
    return bool(dtype_config.is_dynamic) or dtype_config.input_constraints.dtype == torch.float32


def bounds_within(traits: ObserverTraits, constraints: DTypeWithConstraints) -> tuple[int, int]:
    """The range of integers that an observer and a kernel both take."""
    low, high = constraints.integers
    return int(max(traits.quant_min, low)), int(min(traits.quant_max, high))


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
        low, high = constraints.integers
        if traits.quant_min < low:
            return f"{side} quant_min {traits.quant_min} < {low} (quant_min_lower_bound)"
        if traits.quant_max > high:
            return f"{side} quant_max {traits.quant_max} > {high} (quant_max_upper_bound)"
    if traits.eps is not None and traits.eps < constraints.scales[0]:
        return f"{side} eps {traits.eps} < {constraints.scales[0]} (scale_min_lower_bound)"
    if fixes_count and traits.fixed is not None:
        exact = (constraints.scale_exact_match, constraints.zero_point_exact_match)
        for name, own, demanded in zip(("scale", "zero point"), traits.fixed, exact, strict=True):
            if demanded is not None and own != demanded:
                return f"{side} {name} {own}, it takes exactly {demanded}"
    return None
