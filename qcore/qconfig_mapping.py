"""QConfigMapping: which qconfig goes to which operator. The request, as plain data."""

import difflib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from qcore.errors import ConfigError
from qcore.migration import missing_from
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
        default_types: the object types of that default mapping; a model may as well have none of them.
    """

    def __init__(self) -> None:
        self.backend: str | None = None
        self.default_types: frozenset[ObjectType] = frozenset()
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
        _check_type(object_type, "set_object_type")
        self.object_type_qconfigs[object_type] = _checked(qconfig, f"set_object_type({object_type!r})")
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfig | None) -> Self:
        """The qconfig of modules whose path the regex matches from the start (``re.match``); the first one wins."""
        _check_path(module_name_regex, "set_module_name_regex")
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
        _check_path(module_name, "set_module_name")
        self.module_name_qconfigs[module_name] = _checked(qconfig, f"set_module_name({module_name!r})")
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: QConfig | None
    ) -> Self:
        """The qconfig of the ``index``-th call of ``object_type`` within the module at ``module_name``, from 0."""
        _check_path(module_name, "set_module_name_object_type_order")
        _check_type(object_type, "set_module_name_object_type_order")
        if type(index) is not int or index < 0:
            raise ConfigError(
                f"set_module_name_object_type_order: expected the number of a call, from 0, found {index!r}"
            )
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
            ConfigError: keys aren't known ones, or rules are wrong; all at once.
        """
        unknown = [key for key in qconfig_dict if key not in _DICT_KEYS]
        problems = []
        if unknown:
            problems.append(f"unknown keys {unknown} in the qconfig dictionary; known are {list(_DICT_KEYS)}")
        mapping = cls()
        rules: list[tuple[str, Any]] = [("global", (qconfig_dict[""],))] if "" in qconfig_dict else []
        rules += [(kind, rule) for kind in _DICT_KEYS[1:] for rule in qconfig_dict.get(kind, ())]
        for kind, rule in rules:
            try:
                getattr(mapping, f"set_{kind}")(*rule)
            except ConfigError as error:
                problems += error.problems
            except TypeError:
                problems.append(f"{kind}: {rule!r} has the wrong number of entries")
        if problems:
            raise ConfigError(problems)
        return mapping

    def __repr__(self) -> str:
        lines = [f"  {rule}: {qconfig}" for rule, qconfig in self.rules()]
        return "\n".join([f"QConfigMapping(backend={self.backend!r})", *lines])


def object_type_name(object_type: ObjectType) -> str:
    """``object_type`` as a reader knows it."""
    return object_type if isinstance(object_type, str) else getattr(object_type, "__name__", repr(object_type))


def qualified_name(object_type: ObjectType) -> str:
    """``object_type`` with the module that it is from, as ``torch.nn.functional.relu``."""
    if isinstance(object_type, str):
        return f"the method {object_type!r}"
    module = getattr(object_type, "__module__", None) or "torch"
    if module.startswith("torch.nn.modules."):
        module = "torch.nn"
    return f"{'operator' if module == '_operator' else module}.{object_type_name(object_type)}"


def _check_path(path: Any, setter: str) -> None:
    if not isinstance(path, str):
        raise ConfigError(f"{setter}: expected a string, found {path!r}")


def _check_type(object_type: Any, setter: str) -> None:
    if isinstance(object_type, nn.Module):
        kind = type(object_type).__name__
        raise ConfigError(f"{setter}: expected a class, found an instance of {kind}; give {kind} itself")
    if not isinstance(object_type, str):
        if not callable(object_type):
            raise ConfigError(f"{setter}: expected a module class, a function or a method name, found {object_type!r}")
        return
    if hasattr(torch.Tensor, object_type):
        return
    # A string is a method's name: another one would never match a call.
    name = object_type.rpartition(".")[2]
    places = (("torch.nn", nn), ("torch.nn.functional", F), ("torch", torch))
    meant = [f"{place}.{name}" for place, module in places if name and callable(getattr(module, name, None))]
    if not meant:
        names = [kind for kind, value in vars(nn).items() if isinstance(value, type)]
        meant = [f"torch.nn.{close}" for close in difflib.get_close_matches(name, names, n=1)]
        meant += [repr(close) for close in difflib.get_close_matches(name, dir(torch.Tensor), n=1)]
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    raise ConfigError(
        f"{setter}: {object_type!r} is no method of a tensor, and a class or function is given itself, not by its "
        f"name{hint}"
    )


def _checked(qconfig: QConfig | None, where: str) -> QConfig | None:
    if qconfig is None or isinstance(qconfig, QConfig):
        return qconfig
    raise ConfigError(
        f"{where}: expected a qcore.QConfig or None, found {type(qconfig).__module__}.{type(qconfig).__name__}"
    )


if not TYPE_CHECKING:
    __getattr__ = missing_from(__name__)
