"""Rewrites of a graph, and the run that verifies them: the graph computes what it did before, or they are taken back.

Rewrites are exact as mathematics, not to the last bit, and some come from plugins. So the graph runs once more on the
example inputs, and its results may differ by what rounding does.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcore.errors import PluginError
from qcore.fx.expand import expand
from qcore.fx.fuse import FusionPattern, apply_patterns
from qcore.fx.graph_module import QGraphModule
from qcore.fx.names import give_way
from qcore.fx.parts import Part

#: How far a result may be from what it was, relative to its largest value.
TOLERANCE = 1e-4
#: How many of a result's integers may differ: what compares numbers that are almost the same may come out otherwise.
_FLIPPED = 1e-3

_Rewrite = Callable[[QGraphModule], bool]


def rewrite(
    part: Part, patterns: Sequence[FusionPattern], reserved: Collection[str] = ()
) -> tuple[QGraphModule, tuple[str, ...]]:
    """The graph of a part, expanded and fused, and notes on what was taken back.

    Args:
        part: its graph is changed.
        patterns: of the backend.
        reserved: names at which the graph's own tensors and modules mustn't stand.
    """
    give_way(part.graph, reserved)
    rewrites: dict[str, _Rewrite] = {"the expansion of operators": expand}
    for pattern in patterns:
        rewrites[f"the rewrite of {_name(pattern)}"] = lambda graph, own=pattern: apply_patterns(graph, [own])  # type: ignore[misc]
    problem = _problem(part, part.graph, lambda graph: expand(graph) | apply_patterns(graph, patterns))
    if not problem:
        return part.graph, ()
    notes, sound = [], []
    for name, single in rewrites.items():
        if why := _problem(part, _fresh(part, reserved), single):
            notes.append(f"{name} was taken back: {why}")
        else:
            sound.append(single)
    graph = _fresh(part, reserved)
    if not notes or _problem(part, graph, lambda graph: any([single(graph) for single in sound])):
        notes = [f"all rewrites were taken back, as together they change the model: {problem}"]
        graph = _fresh(part, reserved)
    return graph, tuple(notes)


def _fresh(part: Part, reserved: Collection[str]) -> QGraphModule:
    graph = part.trace_again()
    give_way(graph, reserved)
    part.replay(graph)
    return graph


def _name(pattern: FusionPattern) -> str:
    elements = pattern.pattern if isinstance(pattern.pattern, tuple) else (pattern.pattern,)
    names = [getattr(element, "name", None) or getattr(element, "__name__", element) for element in elements]
    return f"{' + '.join(map(str, names))} by {pattern.rewrite.__module__}.{pattern.rewrite.__qualname__}"


def _problem(part: Part, graph: QGraphModule, change: _Rewrite) -> str:
    """What a change of the graph (which says whether it has to be run) does to its results; empty if nothing."""
    try:
        if not change(graph):
            return ""
        found = part.replay(graph)
    except PluginError:
        raise
    except Exception as error:
        return f"with it the graph fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return "" if part.is_random else distance(part.result, found)


def distance(before: Any, after: Any) -> str:
    """How a result differs from another by more than rounding; empty if it doesn't."""
    wanted, spec = pytree.tree_flatten(before)
    given, other = pytree.tree_flatten(after)
    if spec != other:
        return "the result is built otherwise"
    return next(filter(None, map(_apart, wanted, given)), "")


def _apart(want: Any, have: Any) -> str:
    if not isinstance(want, Tensor) or not isinstance(have, Tensor):
        return (
            "" if type(want) is type(have) else f"a result is a {type(have).__name__}, and was a {type(want).__name__}"
        )
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"a result is {have.dtype}{list(have.shape)}, and was {want.dtype}{list(want.shape)}"
    if want.numel() == 0 or want.is_quantized:
        return ""
    if not (want.is_floating_point() or want.is_complex()):
        share = float((want != have).double().mean())
        return f"{share:.0%} of a result's integers are others" if share > _FLIPPED else ""
    # Half precision rounds more coarsely than that.
    allowed = max(TOLERANCE, 64 * torch.finfo(want.dtype).eps)
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(have)):
        return "a result is infinite or no number where it wasn't, or the reverse"
    kind = torch.complex128 if want.is_complex() else torch.float64
    want, have = want.detach()[finite].to(kind), have.detach()[finite].to(kind)
    if want.numel() == 0:
        return ""
    most, far = float(want.abs().max()), float((want - have).abs().max())
    return f"a result differs by {far:.2g}, where its largest value is {most:.2g}" if far > allowed * most else ""
