"""Names of ``torch.ao.quantization`` that qcore lacks, and what to do instead: an import of one says more than no."""

from collections.abc import Callable
from typing import Any, NoReturn

from qcore.errors import NotSupportedError

_TRAINING = "quantization-aware training isn't here yet; prepare_fx does post-training quantization"
_EAGER = "eager mode isn't here: prepare_fx traces the model, so no stubs, no lists of modules to fuse and no wrappers"
_DYNAMIC = "give default_dynamic_qconfig to the layers: QConfigMapping().set_object_type(torch.nn.Linear, ...)"
_CONFIG = "a backend's config is get_backend(name).backend_config()"
_EXPORT = "quantization of exported programs isn't here; prepare_fx takes the torch.nn.Module itself"

#: What to do instead, by name.
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(
        (
            "prepare_qat_fx", "prepare_qat", "quantize_qat", "get_default_qat_qconfig",
            "get_default_qat_qconfig_mapping",
            "get_default_qat_qconfig_dict", "default_qat_qconfig", "default_qat_qconfig_v2", "FakeQuantize",
            "FakeQuantizeBase", "FusedMovingAvgObsFakeQuantize", "default_fake_quant", "default_weight_fake_quant",
            "default_per_channel_weight_fake_quant", "disable_fake_quant", "enable_fake_quant", "disable_observer",
            "enable_observer", "fake_quantize", "default_embedding_qat_qconfig",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        (
            "prepare", "convert", "quantize", "fuse_modules", "fuse_modules_qat", "QuantStub", "DeQuantStub",
            "QuantWrapper", "add_quant_dequant", "propagate_qconfig_", "swap_module",
        ),
        _EAGER,
    ),
    **dict.fromkeys(
        ("quantize_dynamic", "per_channel_dynamic_qconfig", "default_dynamic_quant_observer"), _DYNAMIC
    ),
    **dict.fromkeys(("prepare_pt2e", "prepare_qat_pt2e", "convert_pt2e"), _EXPORT),
    "get_default_qconfig": "it is get_default_qconfig_mapping(backend).global_qconfig",
    "get_default_qconfig_dict": "it is get_default_qconfig_mapping(backend).to_dict()",
    "float16_dynamic_qconfig": "float16 weights aren't here; default_weight_only_qconfig stores int8",
    "float16_static_qconfig": "float16 isn't here; leave the layers float",
    "float_qparams_weight_only_qconfig": "embeddings stay float: no backend quantizes them yet",
    "FuseCustomConfig": "fuse_fx takes none; PrepareCustomConfig has set_preserved_attributes",
    "StandaloneModuleConfigEntry": "standalone modules aren't here yet",
}  # fmt: skip


def missing_from(module: str) -> Callable[[str], Any]:
    """A module's ``__getattr__``, which knows the names that people look for in torch.ao's module.

    Args:
        module: its name.
    """

    def __getattr__(name: str) -> NoReturn:
        is_config = name.startswith("get_") and name.endswith("_backend_config")
        instead = _CONFIG if is_config else NOT_HERE.get(name)
        if instead is not None:
            # No AttributeError: an import statement would turn that into an ImportError without a word of this.
            raise NotSupportedError(f"{module} has no {name}: {instead}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)

    return __getattr__
