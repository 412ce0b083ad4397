"""One model and one mapping through torch.ao and through qcore, and names that both sides' values have in common.

Only the tests in this directory may import torch.ao.quantization; nothing in the library does.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.ao.quantization as ao
from torch import fx, nn
from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx
from torch.ao.quantization.quantize_fx import prepare_fx as ao_prepare_fx

import qcore
from qcore.fx.graph_module import get_attribute
from qcore.fx.observe import observer_nodes
from qcore.fx.operators import CLAMP, operator_of
from qcore.qconfig_mapping import object_type_name

FIXED_0_TO_1 = {"scale": 1.0 / 256.0, "zero_point": 0, "quant_min": 0, "quant_max": 255}
FIXED_MINUS_1_TO_1 = {"scale": 2.0 / 256.0, "zero_point": 128, "quant_min": 0, "quant_max": 255}
#: torch.ao's default mappings say these for every model; in qcore the backend knows them.
FIXED_TYPES = {
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, "sigmoid", nn.Hardsigmoid, nn.Softmax), FIXED_0_TO_1),
    **dict.fromkeys((nn.Tanh, torch.tanh, "tanh"), FIXED_MINUS_1_TO_1),
}


@dataclass(frozen=True)
class Recipe:
    """A qconfig that both sides can build."""

    activation: str = "MinMaxObserver"
    weight: str = "PerChannelMinMaxObserver"
    weight_qscheme: torch.qscheme = torch.per_channel_symmetric

    def build(self, package):
        side = 0 if package is ao else 1
        activation = getattr(package, self.activation) if side else getattr(ao.observer, self.activation)
        weight = getattr(package, self.weight) if side else getattr(ao.observer, self.weight)
        return package.QConfig(
            activation=activation.with_args(dtype=(torch.quint8, torch.uint8)[side], quant_min=0, quant_max=255),
            weight=weight.with_args(dtype=(torch.qint8, torch.int8)[side], qscheme=self.weight_qscheme),
        )


MIN_MAX = Recipe()
PER_TENSOR = Recipe(weight="MinMaxObserver", weight_qscheme=torch.per_tensor_symmetric)
MOVING_AVERAGE = Recipe(activation="MovingAverageMinMaxObserver")


def mapping(package, rules=(("set_global", MIN_MAX),), fixed=True):
    """A mapping of one side from (setter, arguments ..., recipe or None)."""
    made = package.QConfigMapping()
    if package is ao and fixed:
        for object_type, arguments in FIXED_TYPES.items():
            observer = ao.FixedQParamsObserver.with_args(dtype=torch.quint8, **arguments)
            made.set_object_type(object_type, ao.QConfig(activation=observer, weight=MIN_MAX.build(ao).weight))
    for setter, *arguments, recipe in rules:
        getattr(made, setter)(*arguments, recipe.build(package) if recipe is not None else None)
    return made


def config_like_theirs():
    """The reference's config without results that stay float where float reads them: torch.ao has no like of that."""
    own = qcore.get_backend("reference").backend_config()
    return qcore.BackendConfig("reference").set_backend_pattern_configs(
        config for config in own.configs if config.condition is None or "operator" not in config.condition.name
    )


def prepare_both(model, inputs, rules=(("set_global", MIN_MAX),), fixed=True):
    model = model.eval()
    theirs = ao_prepare_fx(model, mapping(ao, rules, fixed), inputs)
    ours = qcore.prepare_fx(
        model, mapping(qcore, rules), inputs, backend_config=config_like_theirs(), backend="reference"
    )
    return theirs, ours


def convert_both(theirs, ours):
    scopes = theirs.meta["_observed_graph_module_attrs"].node_name_to_scope
    reference = _convert_to_reference_decomposed_fx(theirs)
    reference.meta["scopes"] = scopes
    return reference, qcore.convert_to_reference_fx(ours)


class Names:
    """Names values by who produces them, alike for both sides: the module's path, or the calling module's path and
    the function; with a number from the second call on."""

    def __init__(self):
        self.seen = Counter()
        self.names = {}

    def name(self, node, base):
        if node not in self.names:
            self.seen[base] += 1
            self.names[node] = base if self.seen[base] == 1 else f"{base}#{self.seen[base]}"
        return self.names[node]


def their_name(names, module, scopes, node):
    node = _before_fused_relu(module, node)
    if node.op == "placeholder":
        return names.name(node, f"input {node.target}")
    if node.op == "call_module":
        return names.name(node, str(node.target))
    return names.name(node, f"{scopes[node.name][0]}:{object_type_name(node.target)}")


def _before_fused_relu(module, node):
    """torch.ao observes ``relu(add(x, y))`` once, after the relu, and so does qcore: the value is named after add."""
    is_relu = node.target in (torch.relu, nn.functional.relu, "relu", "relu_") or (
        node.op == "call_module" and type(module.get_submodule(node.target)) is nn.ReLU
    )
    source = node.args[0] if is_relu else None
    if source is None or source.op in ("placeholder", "get_attr") or _is_their_observer(module, source):
        return node
    return node if "dequantize" in str(source.target) else source


def _is_their_observer(module, node):
    return node.op == "call_module" and isinstance(module.get_submodule(node.target), ao.ObserverBase)


def our_name(names, node):
    while operator_of(node) is CLAMP and node.args[1:] == (0.0, None) and operator_of(node.args[0]) is not None:
        if len(node.args[0].users) > 1:
            break
        node = node.args[0]
    if node.op == "placeholder":
        return names.name(node, f"input {node.target}")
    origin = node.meta["origin"]
    name = origin.path if origin.is_module else f"{origin.owner_path}:{object_type_name(origin.object_type)}"
    return names.name(node, name)


def their_placement(prepared):
    """Every observed activation, with the first value that the same observer module watches."""
    names, first, found = Names(), {}, {}
    scopes = prepared.meta["_observed_graph_module_attrs"].node_name_to_scope
    for node in prepared.graph.nodes:
        if _is_their_observer(prepared, node) and node.args[0].op != "get_attr":
            name = their_name(names, prepared, scopes, node.args[0])
            found[name] = first.setdefault(id(prepared.get_submodule(node.target)), name)
    return found


def our_placement(prepared):
    names, first, found = Names(), {}, {}
    for node, number in observer_nodes(prepared, qcore.explain(prepared).observers):
        name = our_name(names, node.args[0])
        found[name] = first.setdefault(number, name)
    return found


def their_qparams(reference):
    """Scale and zero point of every quantized activation of a converted model."""
    names, found = Names(), {}
    for node in reference.graph.nodes:
        if "quantized_decomposed.quantize_per_tensor" in str(node.target) and node.args[0].op != "get_attr":
            name = their_name(names, reference, reference.meta["scopes"], node.args[0])
            values = (getattr(reference, v.target) if isinstance(v, fx.Node) else v for v in node.args[1:3])
            found[name] = tuple(float(value) for value in values)
    return found


def our_qparams(reference):
    names, found = Names(), {}
    for node in reference.graph.nodes:
        if node.target is qcore.ops.quantize_per_tensor:
            value = node.args[0].args[0] if node.args[0].target is torch.detach else node.args[0]
            name = our_name(names, value)
            found[name] = tuple(float(get_attribute(reference, v.target)) for v in node.args[1:3])
    return found


def their_weights(reference):
    """The integers of every weight, by the path of its module."""
    found = {}
    for path, module in reference.named_modules():
        if hasattr(module, "get_quantized_weight"):
            owner = path.rpartition(".")[0]
            fused = bool(owner) and type(reference.get_submodule(owner)).__module__.startswith("torch.ao.nn.intrinsic")
            integers = module.get_quantized_weight()
            integers = integers.int_repr() if integers.is_quantized else integers
            found[owner if fused else path] = integers.to(torch.int8)
    return found


def our_weights(reference):
    state = reference.state_dict()
    return {
        name.removesuffix(".weight"): value
        for name, value in state.items()
        if value.dtype == torch.int8 and f"{name}_qparams.scale" in state
    }
