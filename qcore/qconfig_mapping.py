"""QConfigMapping: which qconfig goes to which operator. The request, as plain data."""

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from qcore.errors import ConfigError, Problems
from qcore.migration import explain_missing
from qcore.qconfig import ObserverConstructor, ObserverTraits, QConfig, observer_traits

#: A module class, a function, or the name of a tensor method.
ObjectType = type | Callable[..., Any] | str


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
        self.global_qconfig = _checked("set_global", (), global_qconfig)
        self.has_global = True
        return self

    def set_object_type(self, object_type: ObjectType, qconfig: QConfig | None) -> Self:
        """The qconfig of a module class, a function or a tensor method.

        The class of the module that contains a function call wins over the function itself.
        """
        self.object_type_qconfigs[object_type] = _checked("set_object_type", (object_type,), qconfig)
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfig | None) -> Self:
        """The qconfig of modules whose path the regex matches from the start (``re.match``); the first one wins."""
        checked = _checked("set_module_name_regex", (module_name_regex,), qconfig)
        self.module_name_regex_qconfigs[module_name_regex] = checked
        return self

    def set_module_name(self, module_name: str, qconfig: QConfig | None) -> Self:
        """The qconfig of the module at a path, and of everything below it; the nearest ancestor wins."""
        self.module_name_qconfigs[module_name] = _checked("set_module_name", (module_name,), qconfig)
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: QConfig | None
    ) -> Self:
        """The qconfig of the ``index``-th call of ``object_type`` within the module at ``module_name``, from 0."""
        key = (module_name, object_type, index)
        self.module_name_object_type_order_qconfigs[key] = _checked("set_module_name_object_type_order", key, qconfig)
        return self

    @property
    def asks_for_quantization(self) -> bool:
        """Whether any rule has a qconfig."""
        return any(qconfig is not None for _, qconfig in self.rules())

    def traits(self) -> dict[ObserverConstructor, ObserverTraits]:
        """The traits of every observer constructor in the mapping.

        Raises:
            ConfigError: some can't be built; names all of them with the rule that holds them.
        """
        found: dict[ObserverConstructor, ObserverTraits | None] = {}
        problems = Problems()
        for rule, qconfig in self.rules():
            for field in () if qconfig is None else ("activation", "weight"):
                constructor = getattr(qconfig, field)
                if constructor not in found:
                    found[constructor] = problems.of(observer_traits, constructor, prefix=f"{rule}, {field}: ")
        problems.raise_any()
        return {constructor: traits for constructor, traits in found.items() if traits is not None}

    def rules(self) -> list[tuple[str, QConfig | None]]:
        """Every rule as it was written, with its qconfig, from the weakest to the strongest kind."""
        listed = [(rule_name(kind, *key), qconfig) for kind, key, qconfig in self._entries()]
        return [("global", self.global_qconfig), *listed] if self.has_global else listed

    def _entries(self) -> Iterator[tuple[str, tuple[Any, ...], QConfig | None]]:
        """The kind of each rule but the global one, what it names, and its qconfig."""
        for kind in _KINDS:
            for key, qconfig in getattr(self, f"{kind}_qconfigs").items():
                yield kind, key if isinstance(key, tuple) else (key,), qconfig

    def to_dict(self) -> dict[str, Any]:
        """The mapping in torch.ao's dictionary; ``""`` is left out if nothing was said of the rest."""
        made: dict[str, Any] = {"": self.global_qconfig} if self.has_global else {}
        made |= {kind: [] for kind in _KINDS}
        for kind, key, qconfig in self._entries():
            made[kind].append((*key, qconfig))
        return made

    @classmethod
    def from_dict(cls, qconfig_dict: dict[str, Any]) -> Self:
        """A mapping from torch.ao's dictionary.

        Raises:
            ConfigError: keys aren't known ones, or rules are wrong; all at once.
        """
        known = ["", *_KINDS]
        unknown = [key for key in qconfig_dict if key not in known]
        problems = Problems()
        if unknown:
            problems.append(f"unknown keys {unknown} in the qconfig dictionary; known are {known}")
        mapping = cls()
        rules: list[tuple[str, Any]] = [("global", (qconfig_dict[""],))] if "" in qconfig_dict else []
        rules += [(kind, rule) for kind in _KINDS for rule in qconfig_dict.get(kind, ())]
        for kind, rule in rules:
            try:
                problems.of(getattr(mapping, f"set_{kind}"), *rule)
            except TypeError:
                problems.append(f"{kind}: {rule!r} has the wrong number of entries")
        problems.raise_any()
        return mapping

    def __repr__(self) -> str:
        lines = [f"  {rule}: {qconfig}" for rule, qconfig in self.rules()]
        return "\n".join([f"QConfigMapping(backend={self.backend!r})", *lines])


def rule_name(kind: str, *key: Any) -> str:
    """A rule as ``explain`` prints it: its kind, and what it names."""
    if kind == "object_type":
        return f"object_type {object_type_name(*key)}"
    if kind == "module_name_object_type_order":
        return f"module_name {key[0]!r}, {object_type_name(key[1])} number {key[2]}"
    return f"{kind} {key[0]!r}"


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


def _checked(setter: str, key: tuple[Any, ...], qconfig: QConfig | None) -> QConfig | None:
    """The qconfig of a rule, after both it and what the rule names were found sound."""
    checks = _KINDS.get(setter.removeprefix("set_"), ())
    problems = [f"{setter}: {problem}" for check, named in zip(checks, key, strict=True) if (problem := check(named))]
    if not isinstance(qconfig, QConfig | None):
        where = f"{setter}({', '.join(map(repr, key))})" if key else setter
        found = f"{type(qconfig).__module__}.{type(qconfig).__name__}"
        problems.append(f"{where}: expected a qcore.QConfig or None, found {found}")
    if problems:
        raise ConfigError(problems)
    return qconfig


def _path_problem(path: Any) -> str:
    return "" if isinstance(path, str) else f"expected a string, found {path!r}"


def _regex_problem(regex: Any) -> str:
    problem = _path_problem(regex)
    try:
        re.compile("" if problem else regex)
    except re.error as error:
        problem = f"{regex!r} is no regular expression: {error}"
    return problem


def _index_problem(index: Any) -> str:
    return "" if type(index) is int and index >= 0 else f"expected the number of a call, from 0, found {index!r}"


def _type_problem(object_type: Any) -> str:
    if isinstance(object_type, nn.Module):
        kind = type(object_type).__name__
        return f"expected a class, found an instance of {kind}; give {kind} itself"
    if not isinstance(object_type, str):
        wanted = "expected a module class, a function or a method name"
        return "" if callable(object_type) else f"{wanted}, found {object_type!r}"
    if hasattr(torch.Tensor, object_type):
        return ""
    # A string is a method's name: another one would never match a call.
    name = object_type.rpartition(".")[2]
    places = (("torch.nn", nn), ("torch.nn.functional", F), ("torch", torch))
    meant = [f"{place}.{name}" for place, module in places if name and callable(getattr(module, name, None))]
    if not meant:
        names = [kind for kind, value in vars(nn).items() if isinstance(value, type)]
        meant = [f"torch.nn.{close}" for close in difflib.get_close_matches(name, names, n=1)]
        meant += [repr(close) for close in difflib.get_close_matches(name, dir(torch.Tensor), n=1)]
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return f"{object_type!r} is no method of a tensor, and a class or function is given itself, not by its name{hint}"


#: The kinds of rules but the global one, from the weakest to the strongest, with a check of each thing that they name.
_KINDS: dict[str, tuple[Callable[[Any], str], ...]] = {
    "object_type": (_type_problem,),
    "module_name_regex": (_regex_problem,),
    "module_name": (_path_problem,),
    "module_name_object_type_order": (_path_problem, _type_problem, _index_problem),
}


explain_missing(__name__)
