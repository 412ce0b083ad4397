"""Names of ``torch.ao.quantization`` that qcore lacks, and what to do instead: to ask for one says more than no."""

import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from qcore.errors import NotSupportedError

_CONFIG = "a backend's config is get_backend(name).backend_config()"

#: Names of modules and of methods, by what to do instead.
_INSTEAD = {
    "quantization-aware training isn't here yet; prepare_fx does post-training quantization": (
        "prepare_qat_fx prepare_qat quantize_qat get_default_qat_qconfig get_default_qat_qconfig_mapping "
        "get_default_qat_qconfig_dict default_qat_qconfig default_qat_qconfig_v2 FakeQuantize FakeQuantizeBase "
        "FusedMovingAvgObsFakeQuantize default_fake_quant default_weight_fake_quant "
        "default_per_channel_weight_fake_quant disable_fake_quant enable_fake_quant disable_observer enable_observer "
        "fake_quantize default_embedding_qat_qconfig"
    ),
    "eager mode isn't here: prepare_fx traces the model, so no stubs, no lists of modules to fuse and no wrappers": (
        "prepare convert quantize fuse_modules fuse_modules_qat QuantStub DeQuantStub QuantWrapper add_quant_dequant "
        "propagate_qconfig_ swap_module"
    ),
    "give default_dynamic_qconfig to the layers: QConfigMapping().set_object_type(torch.nn.Linear, ...)": (
        "quantize_dynamic per_channel_dynamic_qconfig default_dynamic_quant_observer"
    ),
    "quantization of exported programs isn't here; prepare_fx takes the torch.nn.Module itself": (
        "prepare_pt2e prepare_qat_pt2e convert_pt2e"
    ),
    "it is get_default_qconfig_mapping(backend).global_qconfig": "get_default_qconfig",
    "it is get_default_qconfig_mapping(backend).to_dict()": "get_default_qconfig_dict",
    "float16 weights aren't here; default_weight_only_qconfig stores int8": "float16_dynamic_qconfig",
    "float16 isn't here; leave the layers float": "float16_static_qconfig",
    "embeddings stay float: no backend quantizes them yet": "float_qparams_weight_only_qconfig",
    "fuse_fx takes none; PrepareCustomConfig has set_preserved_attributes": "FuseCustomConfig",
    "standalone modules aren't here yet": "StandaloneModuleConfigEntry",
    "it isn't supported yet. To keep a submodule float and whole, use set_non_traceable_module_names; to keep it "
    "float, set_module_name(path, None) in the QConfigMapping": (
        "set_standalone_module_name set_standalone_module_class set_float_to_observed_mapping "
        "set_observed_to_quantized_mapping"
    ),
    "qcore works on operators and swaps no modules. Leave the line out; give a chain as a tuple pattern, a rewrite "
    "through the hook qcore_fusion_patterns and kernels through qcore_lower": (
        "set_root_module set_qat_module set_reference_quantized_module set_fused_module set_fuser_method"
    ),
}

#: What to do instead, by name.
NOT_HERE = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}


def explain_missing(module: str) -> None:
    """Give a module a ``__getattr__`` that knows the names which people look for in torch.ao's module.

    Args:
        module: its name.
    """
    sys.modules[module].__dict__["__getattr__"] = partial(missing, module)


def missing(where: str, name: str) -> NoReturn:
    """Raise the error for a name that a module, or an object, doesn't have.

    Args:
        where: the module or the class, for the message.
        name: what is asked for.

    Raises:
        NotSupportedError: torch.ao has it; tells what to do instead.
        AttributeError: nobody knows it.
    """
    is_config = name.startswith("get_") and name.endswith("_backend_config")
    instead = _CONFIG if is_config else NOT_HERE.get(name)
    if instead is not None:
        # No AttributeError: an import statement would turn that into an ImportError without a word of this.
        raise NotSupportedError(f"{where} has no {name}: {instead}")
    raise AttributeError(f"{where!r} has no attribute {name!r}", name=name)


class HasNamesake:
    """Base of a class whose namesake in torch.ao has methods that aren't here."""

    if not TYPE_CHECKING:  # To a type checker it would seem to have every attribute.

        def __getattr__(self, name: str) -> NoReturn:
            missing(type(self).__name__, name)
