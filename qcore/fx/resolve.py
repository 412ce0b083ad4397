"""Which rule of a QConfigMapping speaks of an operator."""

import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from qcore.errors import did_you_mean
from qcore.fx.operators import pattern_keys
from qcore.fx.tracer import Origin
from qcore.qconfig import QConfig
from qcore.qconfig_mapping import ObjectType, QConfigMapping, object_type_name, qualified_name, rule_name

_INPLACE: dict[ObjectType, ObjectType] = {
    operator.add: operator.iadd,
    operator.sub: operator.isub,
    operator.mul: operator.imul,
    operator.truediv: operator.itruediv,
}

#: ``x + y`` and ``x += y`` are one operator to who writes a rule, as they are to torch.ao.
_OTHER_FORM = {**_INPLACE, **{inplace: plain for plain, inplace in _INPLACE.items()}}


@dataclass(frozen=True)
class Resolution:
    """The outcome for one operator.

    Attributes:
        rule: the rule, as ``explain`` prints it; empty if no rule speaks of the operator.
        qconfig: its qconfig; ``None`` means float.
        is_specific: whether the rule names this operator or its module, rather than everything.
    """

    rule: str
    qconfig: QConfig | None
    is_specific: bool = False


class Resolver:
    """Resolves operators against one mapping; precedence as :class:`~qcore.qconfig_mapping.QConfigMapping` says.

    For a function or method call, the class of the containing module wins over the function, as in torch. A rule for
    ``operator.add`` speaks of ``x += y``, too, unless ``operator.iadd`` has one of its own, and the other way round.
    """

    def __init__(self, mapping: QConfigMapping) -> None:
        self._mapping = mapping
        #: Classes in whose forwards functions or methods were called.
        self.scopes: set[type] = set()
        self._by_place: dict[tuple[ObjectType, bool, str, type | None], Resolution] = {}

    def resolve(self, origin: Origin) -> Resolution:
        """The strongest rule that speaks of an operator."""
        key = (origin.owner_path, origin.object_type, origin.index)
        ordered = self._mapping.module_name_object_type_order_qconfigs
        if key in ordered:
            return Resolution(rule_name("module_name_object_type_order", *key), ordered[key], True)
        place = (origin.object_type, origin.is_module, origin.path, origin.scope_type)
        if place not in self._by_place:
            self._by_place[place] = self._resolve_place(*place)
        return self._by_place[place]

    def _resolve_place(self, kind: ObjectType, is_module: bool, place: str, scope: type | None) -> Resolution:
        mapping = self._mapping
        path = place
        if not is_module and scope is not None:
            self.scopes.add(scope)
        while path:
            if path in mapping.module_name_qconfigs:
                specific = is_module and path == place
                return Resolution(rule_name("module_name", path), mapping.module_name_qconfigs[path], specific)
            path = path.rpartition(".")[0]
        for regex, qconfig in mapping.module_name_regex_qconfigs.items():
            if re.match(regex, place):
                return Resolution(rule_name("module_name_regex", regex), qconfig)
        called = (kind, _OTHER_FORM.get(kind))
        for candidate in called if is_module else (scope, *called):
            if candidate is not None and candidate in mapping.object_type_qconfigs:
                name = rule_name("object_type", candidate)
                return Resolution(name, mapping.object_type_qconfigs[candidate], candidate in called)
        return Resolution("global", mapping.global_qconfig) if mapping.has_global else Resolution("", None)

    def unmatched_names(self, module_paths: Iterable[str]) -> list[str]:
        """A sentence for every module name and regex of the mapping that fits no module."""
        paths = set(module_paths)
        problems = []
        for name in self._mapping.module_name_qconfigs:
            if not name:
                problems.append("set_module_name('') names the model itself; say set_global")
            elif name not in paths:
                problems.append(f"set_module_name({name!r}) matches no module{_similar(name, paths)}")
        for name, kind, index in self._mapping.module_name_object_type_order_qconfigs:
            if name not in paths:
                order = f"set_module_name_object_type_order({name!r}, {object_type_name(kind)}, {index})"
                problems.append(f"{order} matches no module{_similar(name, paths)}")
        some = ", ".join(repr(path) for path in sorted(paths - {""})[:3])
        for regex in self._mapping.module_name_regex_qconfigs:
            if not any(re.match(regex, path) for path in paths):
                matched = f"it is matched from the start of paths such as {some}"
                problems.append(f"set_module_name_regex({regex!r}) matches no module; {matched}")
        return problems

    def unmatched_orders(self, calls: Mapping[tuple[str, ObjectType], int]) -> list[str]:
        """A sentence for every ``set_module_name_object_type_order`` that no call answers to.

        Args:
            calls: how often each type is called in each module.
        """
        return [
            f"set_module_name_object_type_order({name!r}, {object_type_name(kind)}, {index}) matches no call; "
            f"there are {calls.get((name, kind), 0)}, counted from 0"
            for name, kind, index in self._mapping.module_name_object_type_order_qconfigs
            if not 0 <= index < calls.get((name, kind), 0)
        ]

    def unmatched_types(self, found: Collection[ObjectType], holders: Collection[type]) -> str:
        """A sentence about the object types of the mapping of which there are none; empty if there are some of each.

        Args:
            found: the types that are called.
            holders: the classes of all modules.
        """
        kinds = self._mapping.object_type_qconfigs
        present = {kind for kind in kinds if kind in found or kind in self.scopes or _OTHER_FORM.get(kind) in found}
        # Who can't know in which form an operator is written gives a rule for each.
        answered = {*self._mapping.default_types, *(key for kind in present for key in pattern_keys(kind))}
        missing = [kind for kind in kinds if not {kind, *pattern_keys(kind)} & (present | answered)]
        if not missing:
            return ""
        named = ", ".join(f"set_object_type({qualified_name(kind)}, ...)" for kind in missing)
        names = sorted({qualified_name(kind) for kind in (*found, *self.scopes)})
        listed = ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
        message = f"{named}: the model calls nothing of the kind, so that changes nothing; called are: {listed}"
        held = [qualified_name(kind) for kind in missing if kind in holders]
        if held:
            message += f". A rule for a class such as {held[0]} speaks of the functions that its own forward calls; "
            message += "set_module_name speaks of all that is below a path"
        return message


def _similar(name: str, paths: set[str]) -> str:
    question = did_you_mean(name, paths - {""}, most=3)
    return f"; {question}" if question else ""
