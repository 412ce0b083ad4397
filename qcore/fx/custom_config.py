"""PrepareCustomConfig and ConvertCustomConfig: exceptions to the rules, with torch.ao's names."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from torch import nn

from qcore.errors import ConfigError, NotSupportedError
from qcore.migration import HasNamesake, explain_missing


class _CustomConfig(HasNamesake):
    #: The setter of each key of torch.ao's dictionary.
    _setters: ClassVar[dict[str, str]]

    def __init__(self) -> None:
        self.preserved_attributes: list[str] = []

    def set_preserved_attributes(self, attributes: Sequence[str]) -> Self:
        """Carry these attributes of the model over to what is made of it."""
        self.preserved_attributes = _listed("set_preserved_attributes", attributes, str, "names")
        return self

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """A config from torch.ao's dictionary.

        Raises:
            ConfigError: a key isn't a known one.
            NotSupportedError: a key is known and not supported yet.
        """
        unknown = [key for key in config if key not in cls._setters]
        if unknown:
            raise ConfigError(f"unknown keys {unknown} in the custom config; known are {list(cls._setters)}")
        made = cls()
        for key, value in config.items():
            getattr(made, cls._setters[key])(value)
        return made


class PrepareCustomConfig(_CustomConfig):
    """What ``prepare_fx`` shall do otherwise. Every setter returns the config.

    Attributes:
        non_traceable_module_names: paths of modules to keep whole and float.
        non_traceable_module_classes: classes of such modules.
        preserved_attributes: names of attributes of the model to carry over.
        guard_failure: ``"error"`` or ``"float"``.
    """

    _setters: ClassVar[dict[str, str]] = {
        "non_traceable_module_name": "set_non_traceable_module_names",
        "non_traceable_module_class": "set_non_traceable_module_classes",
        "preserved_attributes": "set_preserved_attributes",
        "input_quantized_idxs": "set_input_quantized_indexes",
        "output_quantized_idxs": "set_output_quantized_indexes",
        "standalone_module_name": "set_standalone_module_name",
        "standalone_module_class": "set_standalone_module_class",
        "float_to_observed_custom_module_class": "set_float_to_observed_mapping",
    }

    def __init__(self) -> None:
        super().__init__()
        self.guard_failure = "error"
        self.non_traceable_module_names: list[str] = []
        self.non_traceable_module_classes: list[type[nn.Module]] = []

    def set_non_traceable_module_names(self, module_names: Sequence[str]) -> Self:
        """Keep the modules at these paths whole and float."""
        self.non_traceable_module_names = _listed("set_non_traceable_module_names", module_names, str, "module paths")
        return self

    def set_non_traceable_module_classes(self, module_classes: Sequence[type[nn.Module]]) -> Self:
        """Keep modules of these classes whole and float."""
        classes = _listed("set_non_traceable_module_classes", module_classes, type, "module classes")
        self.non_traceable_module_classes = classes
        return self

    def set_guard_failure(self, action: str) -> Self:
        """What to do about a call with other constants, containers or sizes than the model was prepared for.

        Args:
            action: ``"error"`` raises a :class:`~qcore.errors.GuardError`; ``"float"`` keeps a float model beside the
                quantized one and calls that.
        """
        if action not in ("error", "float"):
            raise ConfigError(f'set_guard_failure: expected "error" or "float", found {action!r}')
        self.guard_failure = action
        return self

    def set_input_quantized_indexes(self, indexes: Sequence[int]) -> Self:
        """Not yet: inputs that arrive quantized, and outputs that leave so; only that there are none may be said."""
        if indexes:
            raise NotSupportedError(f"inputs and outputs are float, found the indexes {indexes}; leave them out")
        return self

    set_output_quantized_indexes = set_input_quantized_indexes


class ConvertCustomConfig(_CustomConfig):
    """What ``convert_fx`` shall do otherwise. Every setter returns the config.

    Attributes:
        preserved_attributes: names of attributes of the prepared model to carry over.
    """

    _setters: ClassVar[dict[str, str]] = {
        "preserved_attributes": "set_preserved_attributes",
        "observed_to_quantized_custom_module_class": "set_observed_to_quantized_mapping",
    }


def _listed(setter: str, values: Any, kind: type, wanted: str) -> list[Any]:
    """The values as a list, if all are of a kind; a bare string is no list of names."""
    is_list = isinstance(values, Iterable) and not isinstance(values, (str, type))
    items = list(values) if is_list else []
    if not is_list or not all(isinstance(item, kind) for item in items):
        raise ConfigError(f"{setter}: expected a list of {wanted}, found {values!r}")
    return items


explain_missing(__name__)
