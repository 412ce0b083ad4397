"""How close a quantized network comes to the float network, in the two figures that benchmarks report."""

import math

from torch import Tensor


def agreement(float_logits: Tensor, logits: Tensor) -> float:
    """Share of the samples whose top class is the float network's top class.

    Args:
        float_logits: Outputs of the float network, (samples, classes).
        logits: Outputs of the quantized network, same shape.

    Returns:
        A fraction in 0..1. It says nothing about which of the two is right.
    """
    _check_shapes(float_logits, logits)
    return (float_logits.argmax(dim=1) == logits.argmax(dim=1)).double().mean().item()


def sqnr_db(float_logits: Tensor, logits: Tensor) -> float:
    """Signal-to-quantization-noise ratio of the outputs, over all samples together, in decibels.

    Args:
        float_logits: Outputs of the float network, the signal.
        logits: Outputs of the quantized network, same shape.

    Returns:
        ``10 log10(sum signal^2 / sum (signal - output)^2)``: 0 for outputs that are all zero, infinity for
        equal ones.
    """
    _check_shapes(float_logits, logits)
    signal = float_logits.double()
    noise_power = (signal - logits.double()).square().sum().item()
    signal_power = signal.square().sum().item()
    if noise_power == 0.0:
        return math.inf
    return 10.0 * math.log10(signal_power / noise_power) if signal_power > 0.0 else -math.inf


def _check_shapes(float_logits: Tensor, logits: Tensor) -> None:
    # A silent broadcast would turn a mistake of the caller into a plausible figure.
    if float_logits.shape != logits.shape:
        raise ValueError(f"shapes differ: {tuple(float_logits.shape)} and {tuple(logits.shape)}")
