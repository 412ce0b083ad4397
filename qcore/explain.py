"""explain: what qcore decided for a model, and why."""

from torch import nn

from qcore.errors import ConfigError
from qcore.fx.graph_module import QGraphModule
from qcore.quantization_plan import QuantizationPlan


def explain(model: nn.Module) -> QuantizationPlan:
    """The plan of a prepared, reference or converted model; printing it shows a table.

    Raises:
        ConfigError: the model wasn't made by qcore.
    """
    preparation = model.preparation if isinstance(model, QGraphModule) else None
    if preparation is None:
        raise ConfigError(
            f"explain needs a model that prepare_fx or convert_fx returned, found {type(model).__name__}"
        )
    return preparation.plan
