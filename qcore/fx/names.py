"""Names: those of the user's that generated code can read, and free ones for what qcore adds.

A graph reads its modules and tensors as attributes of a GraphModule. So a name of the user's that every GraphModule has
as an attribute (``code``), or every module (``type``), or that can't be written, stands under another in the graph;
every other stays as it is. What qcore adds takes names that nothing has: no module, no tensor, no attribute.
"""

import functools
import keyword
import unicodedata
from collections.abc import Callable, Collection, Iterable

from torch import fx, nn

from qcore.fx.graph_module import LATER_ATTRIBUTES, REGISTRIES, QGraphModule, submodule

_OF_MODULES = frozenset(dir(nn.Module()))


@functools.cache
def own_names() -> frozenset[str]:
    """The attributes that every GraphModule of qcore's has, and other modules don't."""
    made = frozenset((*dir(QGraphModule.of(nn.Module(), fx.Graph())), *LATER_ATTRIBUTES)) - _OF_MODULES
    return made.difference(dir(nn.Module))  # Other libraries give it attributes of their own.


def can_be_preserved(name: str) -> bool:
    """Whether a GraphModule can have an attribute of the user's of this name."""
    return name not in own_names() and name not in vars(nn.Module()).keys() - {"training"} and name != "forward"


def hidden_attributes(names: Iterable[str]) -> list[str]:
    """A sentence for every name of an attribute that can't be preserved."""
    return [
        f"set_preserved_attributes: {name!r} is an attribute that every GraphModule has, which would hide the model's; "
        "give it another name"
        for name in names
        if not can_be_preserved(name)
    ]


def qparams_targets(name: str) -> tuple[str, str]:
    """The scale and the zero point of qparams of this name: buffers of a module that holds nothing else."""
    return f"{name}.scale", f"{name}.zero_point"


def free_target(wanted: str, *roots: nn.Module) -> str:
    """``wanted``, or ``wanted_1``, ``wanted_2`` ...: a path at which none of these roots of graphs has anything."""
    return _first_free(wanted, lambda target: all(is_free(root, target) for root in roots))


def is_free(root: nn.Module, target: str) -> bool:
    """Whether a new module or tensor may stand at a path of a root of a graph."""
    *steps, name = target.split(".")
    if not _can_stand((steps or [name])[0], True):
        return False
    for step in steps:
        inner = root._modules.get(step)
        if inner is None:
            return not _has(root, step)
        root = inner
    return not _has(root, name)


def readable_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Where modules and tensors of ``model`` stand in a graph: at their own paths, wherever code can read those.

    Args:
        model: the user's.
        targets: paths in it; what starts with a dot is a new tensor.
    """
    found = {"": ""}
    new: set[str] = set()

    def free(wanted: str, owner: str) -> str:
        holder = submodule(model, owner)
        name = _first_free(
            wanted, lambda n: _can_stand(n, not owner) and f"{owner}.{n}" not in new and not _has(holder, n)
        )
        new.add(f"{owner}.{name}")
        return name

    for target in targets:
        if target.startswith("."):
            found[target] = free(target[1:], "")
            continue
        owner = ""
        for step in target.split("."):
            path = f"{owner}.{step}" if owner else step
            if path not in found:
                name = step
                if not _can_stand(step, not owner):
                    letters = "".join(c if c.isascii() and c.isalnum() else "_" for c in step)
                    name = free(letters if letters[:1].isalpha() else f"_{letters}", owner)
                found[path] = f"{found[owner]}.{name}" if owner else name
            owner = path
    return found


def give_way(module: QGraphModule, names: Collection[str]) -> None:
    """Let a graph read by other names what it has at these: something else is to stand there."""
    moved: dict[str, str] = {}
    for name in names:
        for registry in REGISTRIES:
            if name in vars(module)[registry]:
                moved[name] = free_target(name, module)
                vars(module)[registry][moved[name]] = vars(module)[registry].pop(name)
                if name in module._non_persistent_buffers_set:
                    module._non_persistent_buffers_set.remove(name)
                    module._non_persistent_buffers_set.add(moved[name])
    if not moved:
        return
    for node in module.graph.nodes:
        first, dot, rest = str(node.target).partition(".")
        if node.op in ("get_attr", "call_module") and first in moved:
            node.target = f"{moved[first]}{dot}{rest}"


def _can_stand(step: str, is_first: bool) -> bool:
    """Whether generated code can read this step of a path."""
    if step in _OF_MODULES or (is_first and step in own_names()) or keyword.iskeyword(step):
        return False
    if step.startswith("__") and step.endswith("__"):  # Python and copy look for such, and take them for methods.
        return False
    if step.isidentifier():  # Python takes some letters for others.
        return unicodedata.is_normalized("NFKC", step)
    return repr(step) == f"'{step}'" and '"' not in step  # It is written as a string.


def _has(module: nn.Module, name: str) -> bool:
    spaces = (vars(module), *(vars(module)[registry] for registry in REGISTRIES), *map(vars, type(module).__mro__))
    return any(name in space for space in spaces)


def _first_free(wanted: str, is_free: Callable[[str], bool]) -> str:
    if is_free(wanted):
        return wanted
    low, high = 0, 1  # Names that clash come in runs, which may be long.
    while not is_free(f"{wanted}_{high}"):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_free(f"{wanted}_{middle}") else (middle, high)
    return f"{wanted}_{high}"
