"""PrepareCustomConfig and ConvertCustomConfig: exceptions to the rules, with torch.ao's names."""

from collections.abc import Sequence
from typing import Any, Self

from torch import nn

from qcore.errors import ConfigError, NotSupportedError


class PrepareCustomConfig:
    """What ``prepare_fx`` shall do otherwise. Every setter returns the config.

    Attributes:
        non_traceable_module_names: paths of modules to keep whole and float.
        non_traceable_module_classes: classes of such modules.
        preserved_attributes: names of attributes of the model to carry over.
        guard_failure: ``"error"`` or ``"float"``.
    """

    def __init__(self) -> None:
        self.guard_failure = "error"
        self.non_traceable_module_names: list[str] = []
        self.non_traceable_module_classes: list[type[nn.Module]] = []
        self.preserved_attributes: list[str] = []

    def set_non_traceable_module_names(self, module_names: Sequence[str]) -> Self:
        """Keep the modules at these paths whole and float."""
        self.non_traceable_module_names = list(module_names)
        return self

    def set_non_traceable_module_classes(self, module_classes: Sequence[type[nn.Module]]) -> Self:
        """Keep modules of these classes whole and float."""
        self.non_traceable_module_classes = list(module_classes)
        return self

    def set_preserved_attributes(self, attributes: Sequence[str]) -> Self:
        """Carry these attributes of the model over to the prepared and the converted one."""
        self.preserved_attributes = list(attributes)
        return self

    def set_guard_failure(self, action: str) -> Self:
        """What to do about a call in a form that the model wasn't prepared for.

        Args:
            action: ``"error"`` raises a :class:`~qcore.errors.GuardError`; ``"float"`` keeps a float model beside the
                quantized one and calls that.
        """
        if action not in ("error", "float"):
            raise ConfigError(f'set_guard_failure: expected "error" or "float", found {action!r}')
        self.guard_failure = action
        return self

    def set_standalone_module_name(self, *_arguments: Any, **_keywords: Any) -> Self:
        """Not yet: submodules prepared as a unit."""
        raise _not_yet("set_standalone_module_name")

    def set_standalone_module_class(self, *_arguments: Any, **_keywords: Any) -> Self:
        """Not yet: submodules prepared as a unit."""
        raise _not_yet("set_standalone_module_class")

    def set_float_to_observed_mapping(self, *_arguments: Any, **_keywords: Any) -> Self:
        """Not yet: custom modules."""
        raise _not_yet("set_float_to_observed_mapping")

    def set_input_quantized_indexes(self, indexes: Sequence[int]) -> Self:
        """Not yet: inputs that arrive quantized."""
        if not indexes:
            return self
        raise _not_yet("set_input_quantized_indexes")

    def set_output_quantized_indexes(self, indexes: Sequence[int]) -> Self:
        """Not yet: outputs that leave quantized."""
        if not indexes:
            return self
        raise _not_yet("set_output_quantized_indexes")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """A config from torch.ao's dictionary form.

        Raises:
            ConfigError: a key isn't a known one.
            NotSupportedError: a key is known and not supported yet.
        """
        setters = {
            "non_traceable_module_name": "set_non_traceable_module_names",
            "non_traceable_module_class": "set_non_traceable_module_classes",
            "preserved_attributes": "set_preserved_attributes",
            "input_quantized_idxs": "set_input_quantized_indexes",
            "output_quantized_idxs": "set_output_quantized_indexes",
            "standalone_module_name": "set_standalone_module_name",
            "standalone_module_class": "set_standalone_module_class",
            "float_to_observed_custom_module_class": "set_float_to_observed_mapping",
        }
        unknown = [key for key in config if key not in setters]
        if unknown:
            raise ConfigError(f"unknown keys {unknown} in the custom config; known are {list(setters)}")
        made = cls()
        for key, value in config.items():
            getattr(made, setters[key])(value)
        return made


class ConvertCustomConfig:
    """What ``convert_fx`` shall do otherwise.

    Attributes:
        preserved_attributes: names of attributes of the prepared model to carry over.
    """

    def __init__(self) -> None:
        self.preserved_attributes: list[str] = []

    def set_preserved_attributes(self, attributes: Sequence[str]) -> Self:
        """Carry these attributes of the prepared model over to the converted one."""
        self.preserved_attributes = list(attributes)
        return self

    def set_observed_to_quantized_mapping(self, *_arguments: Any, **_keywords: Any) -> Self:
        """Not yet: custom modules."""
        raise NotSupportedError("ConvertCustomConfig.set_observed_to_quantized_mapping isn't supported yet")


def _not_yet(setter: str) -> NotSupportedError:
    return NotSupportedError(
        f"PrepareCustomConfig.{setter} isn't supported yet. To keep a submodule float and whole, use "
        "set_non_traceable_module_names; to keep it float, set_module_name(path, None) in the QConfigMapping"
    )
