"""QConfigMapping: which qconfig goes to which operator. The request, as plain data."""

import re
from collections.abc import Callable
from typing import Any, Self

from qcore.errors import ConfigError
from qcore.qconfig import ObserverConstructor, ObserverTraits, QConfig, observer_traits

#: A module class, a function, or the name of a tensor method.
ObjectType = type | Callable[..., Any] | str

_DICT_KEYS = ("", "object_type", "module_name_regex", "module_name", "module_name_object_type_order")


class QConfigMapping:
    """Rules from operators to qconfigs. Every setter returns the mapping, ``None`` means: stay float.

    A later line of this list wins over an earlier one:

    1. :meth:`set_global`
    2. :meth:`set_object_type`
    3. :meth:`set_module_name_regex`
    4. :meth:`set_module_name`
    5. :meth:`set_module_name_object_type_order`

    Attributes:
        backend: the backend whose default mapping this is, or ``None``; ``prepare_fx`` uses it when it isn't told.
    """

    def __init__(self) -> None:
        self.backend: str | None = None
        self.global_qconfig: QConfig | None = None
        self.has_global = False
        self.object_type_qconfigs: dict[ObjectType, QConfig | None] = {}
        self.module_name_regex_qconfigs: dict[str, QConfig | None] = {}
        self.module_name_qconfigs: dict[str, QConfig | None] = {}
        self.module_name_object_type_order_qconfigs: dict[tuple[str, ObjectType, int], QConfig | None] = {}

    def set_global(self, global_qconfig: QConfig | None) -> Self:
        """The qconfig of every operator that no other rule names."""
        self.global_qconfig = _checked(global_qconfig, "set_global")
        self.has_global = True
        return self

    def set_object_type(self, object_type: ObjectType, qconfig: QConfig | None) -> Self:
        """The qconfig of a module class, a function or a tensor method.

        The class of the module that contains a function call wins over the function itself.
        """
        if not (isinstance(object_type, str) or callable(object_type)):
            raise ConfigError(
                f"set_object_type: expected a module class, a function or a method name, found {object_type!r}"
            )
        self.object_type_qconfigs[object_type] = _checked(qconfig, f"set_object_type({object_type!r})")
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfig | None) -> Self:
        """The qconfig of modules whose path the regex matches from the start (``re.match``); the first one wins."""
        try:
            re.compile(module_name_regex)
        except re.error as error:
            raise ConfigError(
                f"set_module_name_regex: {module_name_regex!r} is no regular expression: {error}"
            ) from error
        self.module_name_regex_qconfigs[module_name_regex] = _checked(
            qconfig, f"set_module_name_regex({module_name_regex!r})"
        )
        return self

    def set_module_name(self, module_name: str, qconfig: QConfig | None) -> Self:
        """The qconfig of the module at a path, and of everything below it; the nearest ancestor wins."""
        self.module_name_qconfigs[module_name] = _checked(qconfig, f"set_module_name({module_name!r})")
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: QConfig | None
    ) -> Self:
        """The qconfig of the ``index``-th call of ``object_type`` within the module at ``module_name``."""
        self.module_name_object_type_order_qconfigs[(module_name, object_type, index)] = _checked(
            qconfig, f"set_module_name_object_type_order({module_name!r}, {object_type!r}, {index})"
        )
        return self

    @property
    def asks_for_quantization(self) -> bool:
        """Whether any rule has a qconfig."""
        rules = (
            self.object_type_qconfigs, self.module_name_regex_qconfigs, self.module_name_qconfigs,
            self.module_name_object_type_order_qconfigs,
        )  # fmt: skip
        return self.global_qconfig is not None or any(q is not None for rule in rules for q in rule.values())

    def traits(self) -> dict[ObserverConstructor, ObserverTraits]:
        """The traits of every observer constructor in the mapping.

        Raises:
            ConfigError: some can't be built; names all of them with the rule that holds them.
        """
        found: dict[ObserverConstructor, ObserverTraits] = {}
        problems = []
        for rule, qconfig in self.rules():
            if qconfig is None:
                continue
            for field in ("activation", "weight"):
                constructor = getattr(qconfig, field)
                if constructor in found:
                    continue
                try:
                    found[constructor] = observer_traits(constructor)
                except ConfigError as error:
                    problems += [f"{rule}, {field}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems)
        return found

    def rules(self) -> list[tuple[str, QConfig | None]]:
        """Every rule as it was written, with its qconfig, from the weakest to the strongest kind."""
        listed: list[tuple[str, QConfig | None]] = []
        if self.has_global:
            listed.append(("global", self.global_qconfig))
        for object_type, qconfig in self.object_type_qconfigs.items():
            listed.append((f"object_type {object_type_name(object_type)}", qconfig))
        for regex, qconfig in self.module_name_regex_qconfigs.items():
            listed.append((f"module_name_regex {regex!r}", qconfig))
        for name, qconfig in self.module_name_qconfigs.items():
            listed.append((f"module_name {name!r}", qconfig))
        for (name, object_type, index), qconfig in self.module_name_object_type_order_qconfigs.items():
            listed.append((f"module_name {name!r}, {object_type_name(object_type)} number {index}", qconfig))
        return listed

    def to_dict(self) -> dict[str, Any]:
        """The mapping in torch.ao's dictionary form; ``""`` is left out if nothing was said of the rest."""
        return {
            **({"": self.global_qconfig} if self.has_global else {}),
            "object_type": list(self.object_type_qconfigs.items()),
            "module_name_regex": list(self.module_name_regex_qconfigs.items()),
            "module_name": list(self.module_name_qconfigs.items()),
            "module_name_object_type_order": [
                (*key, qconfig) for key, qconfig in self.module_name_object_type_order_qconfigs.items()
            ],
        }

    @classmethod
    def from_dict(cls, qconfig_dict: dict[str, Any]) -> Self:
        """A mapping from torch.ao's dictionary form.

        Raises:
            ConfigError: a key isn't one of the known ones.
        """
        unknown = [key for key in qconfig_dict if key not in _DICT_KEYS]
        if unknown:
            raise ConfigError(f"unknown keys {unknown} in the qconfig dictionary; known are {list(_DICT_KEYS)}")
        mapping = cls()
        if "" in qconfig_dict:
            mapping.set_global(qconfig_dict[""])
        for object_type, qconfig in qconfig_dict.get("object_type", ()):
            mapping.set_object_type(object_type, qconfig)
        for regex, qconfig in qconfig_dict.get("module_name_regex", ()):
            mapping.set_module_name_regex(regex, qconfig)
        for name, qconfig in qconfig_dict.get("module_name", ()):
            mapping.set_module_name(name, qconfig)
        for name, object_type, index, qconfig in qconfig_dict.get("module_name_object_type_order", ()):
            mapping.set_module_name_object_type_order(name, object_type, index, qconfig)
        return mapping

    def __repr__(self) -> str:
        lines = [f"  {rule}: {qconfig}" for rule, qconfig in self.rules()]
        return "\n".join([f"QConfigMapping(backend={self.backend!r})", *lines])


def object_type_name(object_type: ObjectType) -> str:
    """``object_type`` as a reader knows it."""
    return object_type if isinstance(object_type, str) else getattr(object_type, "__name__", repr(object_type))


def _checked(qconfig: QConfig | None, where: str) -> QConfig | None:
    if qconfig is None or isinstance(qconfig, QConfig):
        return qconfig
    raise ConfigError(
        f"{where}: expected a qcore.QConfig or None, found {type(qconfig).__module__}.{type(qconfig).__name__}"
    )
