"""What the tables of backends on torch's kernels have in common: activations uint8, weights int8 around zero."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qcore.backend_config import BackendPatternConfig, Condition, DTypeConfig, DTypeWithConstraints, Pattern
from qcore.dtypes import QScheme
from qcore.fx import operators as op
from qcore.fx.sharing import sharing_patterns
from qcore.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import QConfigMapping

ACTIVATION = DTypeWithConstraints(torch.uint8, qschemes=(QScheme.per_tensor_affine, QScheme.per_tensor_symmetric))

#: Weights with a scale for each output channel.
PER_CHANNEL = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_channel_symmetric,), ch_axis=0)

#: Weights of one scale.
PER_TENSOR = DTypeWithConstraints(torch.int8, qschemes=(QScheme.per_tensor_symmetric,))

#: The same for kernels that add pairs of products in 16 bits: in 7 bits they can't saturate.
PER_TENSOR_NARROW = DTypeWithConstraints(torch.int8, -64, 64, qschemes=(QScheme.per_tensor_symmetric,))

#: The range of what lies in 0..1, and of what lies in -1..1.
UNIT_RANGE = DTypeWithConstraints(torch.uint8, scale_exact_match=1.0 / 256.0, zero_point_exact_match=0)
AROUND_ZERO = DTypeWithConstraints(torch.uint8, scale_exact_match=2.0 / 256.0, zero_point_exact_match=128)

#: Where one range for all inputs costs too much: it is taken at run time, or only the weight is quantized.
DYNAMIC = DTypeConfig(ACTIVATION, torch.float32, PER_CHANNEL, torch.float32, is_dynamic=True)
WEIGHT_ONLY = DTypeConfig(torch.float32, torch.float32, PER_CHANNEL, torch.float32)


def _is_depthwise(conv: fx.Node) -> bool:
    weight = conv.args[1]
    example = weight.meta.get("example") if isinstance(weight, fx.Node) else None
    return example is not None and example.shape[1] == 1


DEPTHWISE = Condition("depthwise", _is_depthwise)

#: Operators with an output of their own scale, that every backend here computes.
UNWEIGHTED = (
    op.ADD, op.MUL, *op.AVG_POOL, *op.ADAPTIVE_AVG_POOL, op.MEAN, op.HARDSWISH, op.LEAKY_RELU, op.ELU, op.INTERPOLATE,
)  # fmt: skip


def weighted(
    weights: Sequence[DTypeWithConstraints], output: DTypeWithConstraints | torch.dtype = ACTIVATION
) -> list[DTypeConfig]:
    """What a kernel with a weight takes: integers, and a bias in float.

    Args:
        weights: the kinds of weights.
        output: of the result.
    """
    return [DTypeConfig(ACTIVATION, output, weight, torch.float32) for weight in weights]


def pattern(chain: Pattern, dtypes: Sequence[DTypeConfig], condition: Condition | None = None) -> BackendPatternConfig:
    """A pattern with all that is said of it."""
    config = BackendPatternConfig(chain).set_dtype_configs(list(dtypes))
    return config if condition is None else config.set_condition(condition)


def unweighted_patterns(
    more: Sequence[Pattern] = (), more_in_unit: Sequence[Pattern] = ()
) -> list[BackendPatternConfig]:
    """The patterns of operators without weights.

    Args:
        more: operators that a backend computes besides :data:`UNWEIGHTED`.
        more_in_unit: those whose output lies in 0..1, besides the sigmoids.
    """
    plain = DTypeConfig(ACTIVATION, ACTIVATION)
    in_unit, around_zero = DTypeConfig(ACTIVATION, UNIT_RANGE), DTypeConfig(ACTIVATION, AROUND_ZERO)
    return [
        *(pattern(operator, [plain]) for operator in (*UNWEIGHTED, *more)),
        *(pattern(operator, [in_unit]) for operator in (op.SIGMOID, op.HARDSIGMOID, *more_in_unit)),
        pattern(op.TANH, [around_zero]),
        *sharing_patterns(plain),
    ]


def default_mapping(of_one_scale: Sequence[Callable[..., Any]] = ()) -> QConfigMapping:
    """uint8 activations by least squared error, int8 weights per channel whose rounding keeps each channel's sum.

    Args:
        of_one_scale: object types whose kernels know no scales per channel: their weights get one.
    """
    activation = HistogramObserver.with_args()
    weight = PerChannelMinMaxObserver.with_args(
        dtype=torch.int8, qscheme=QScheme.per_channel_symmetric, rounding="sum_preserving"
    )
    mapping = QConfigMapping().set_global(QConfig(activation, weight))
    whole = MinMaxObserver.with_args(dtype=torch.int8, qscheme=QScheme.per_tensor_symmetric)
    for object_type in of_one_scale:
        mapping.set_object_type(object_type, QConfig(activation, whole))
    return mapping


def transposed_types(dimensions: int) -> tuple[Callable[..., Any], ...]:
    """Transposed convolutions of up to so many dimensions, as a mapping names them."""
    modules = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)[:dimensions]
    return (*modules, *(operator.function for operator in op.CONV_TRANSPOSE[:dimensions]))
