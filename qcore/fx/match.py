"""Finds the backend's patterns in a graph: one look at each node, by the operator that anchors a pattern."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, TypeVar

from torch import fx, nn

from qcore.backend_config import BackendConfig, BackendPatternConfig, ObservationType, Pattern
from qcore.fx.operators import Kind, activation_inputs, anchor_key, operator_of, pattern_keys

T = TypeVar("T")


@dataclass(frozen=True)
class Match:
    """One place where a pattern fits.

    Attributes:
        nodes: the chain, in the order of execution; the last one gives the result.
        clamps: how many nodes at its end are clamps that the quantize after them makes needless.
        config: the backend's config for the pattern.
    """

    nodes: tuple[fx.Node, ...]
    clamps: int
    config: BackendPatternConfig

    @property
    def anchor(self) -> fx.Node:
        """The first node: the one whose qconfig counts, and the only one that may have a weight."""
        return self.nodes[0]

    @property
    def result(self) -> fx.Node:
        """The last node."""
        return self.nodes[-1]

    def without_absorbed(self) -> tuple["Match", tuple[fx.Node, ...]]:
        """The match of the pattern's own nodes, and the clamps that it takes with it beyond those."""
        length = len(pattern_keys(self.config.pattern))
        absorbed = len(self.nodes) - length
        return Match(self.nodes[:length], self.clamps - absorbed, self.config), self.nodes[length:]

    def inputs(self) -> list[fx.Node]:
        """What the chain reads as activations from outside, in order."""
        inside = set(self.nodes)
        return [source for node in self.nodes for source in activation_inputs(node) if source not in inside]


class PatternTable(Generic[T]):
    """Things that each have a pattern, by the operator that the pattern begins with.

    Args:
        patterns: patterns, each with what it is the pattern of. Longer ones are tried first, those of equal length in
            the order in which they are given.
    """

    def __init__(self, patterns: Iterable[tuple[Pattern, T]]) -> None:
        self._by_anchor: dict[object, list[tuple[tuple[object, ...], T]]] = {}
        for pattern, item in patterns:
            keys = pattern_keys(pattern)
            self._by_anchor.setdefault(keys[0], []).append((keys, item))
        for candidates in self._by_anchor.values():
            candidates.sort(key=lambda candidate: -len(candidate[0]))

    def chains(self, node: fx.Node, module_types: dict[str, type[nn.Module]]) -> Iterator[tuple[list[fx.Node], T]]:
        """The chains that begin with ``node``, in each of which a node is the only reader of the one before it."""
        for keys, item in self._by_anchor.get(anchor_key(node, module_types), ()):
            chain = [node]
            for key in keys[1:]:
                reader = only_reader(chain[-1])
                if reader is None or anchor_key(reader, module_types) != key:
                    break
                chain.append(reader)
            else:
                yield chain, item


def find_matches(
    graph: fx.Graph,
    config: BackendConfig,
    module_types: dict[str, type[nn.Module]],
    may_absorb: Callable[[fx.Node, fx.Node], bool],
    accepts: Callable[[fx.Node, BackendPatternConfig], bool],
) -> list[Match]:
    """Cover the graph with patterns, first come first served, longest first.

    Args:
        graph: in normal form, with examples.
        config: the backend's patterns; of equal length those with a condition are tried first, and then those that were
            added last, as everywhere in a BackendConfig.
        module_types: classes of the leaf modules, by path.
        may_absorb: whether a clamp (second) may be absorbed by the quantize that follows a pattern (anchor first);
            asked only where nothing else reads the clamp's input.
        accepts: whether a pattern's dtype configs take the qconfig of an anchor; of several patterns that fit, the
            first that does is chosen, and the first of all if none does.

    Returns:
        The matches, in the order of their results: all that a match reads from other matches comes before it.
    """
    observed = [c for c in config.configs if c.observation_type is not ObservationType.INPUT_OUTPUT_NOT_OBSERVED]
    ordered = sorted(reversed(observed), key=lambda pattern: pattern.condition is None)
    table = PatternTable((pattern.pattern, pattern) for pattern in ordered)
    matches: list[Match] = []
    taken: set[fx.Node] = set()
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node in taken or node.op not in ("call_function", "call_method", "call_module"):
            continue
        fitting = [
            (chain, pattern)
            for chain, pattern in table.chains(node, module_types)
            if taken.isdisjoint(chain)
            and all(map(_goes_on, chain, chain[1:]))
            and (pattern.condition is None or pattern.condition.holds(node))
        ]
        if not fitting:
            continue
        chain, pattern = fitting[0]
        if len(fitting) > 1:
            chain, pattern = next((item for item in fitting if accepts(node, item[1])), fitting[0])
        clamps = 0
        if pattern.observation_type is ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT:
            chain += _absorbable(chain, taken, may_absorb)
            # Those that the pattern itself names at its end count as well.
            clamps = len(list(takewhile(_is_clamp, reversed(chain[1:]))))
        matches.append(Match(tuple(chain), clamps, pattern))
        taken.update(chain)
    matches.sort(key=lambda match: position[match.result])
    return matches


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node`` as an activation; ``None`` if several do, or none, or the output."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if reader.op != "output" and node in activation_inputs(reader) else None


def _goes_on(value: fx.Node, reader: fx.Node) -> bool:
    """Whether a reader computes with the value of the chain once, and with tensors for the rest.

    In ``x + x`` the chain's own value is the other operand, too; an addition of a number is none of a residual.
    """
    inputs, op = activation_inputs(reader), operator_of(reader)
    return inputs.count(value) == 1 and (op is None or len(op.activations) == len(inputs))


def _absorbable(
    chain: list[fx.Node], taken: set[fx.Node], may_absorb: Callable[[fx.Node, fx.Node], bool]
) -> list[fx.Node]:
    clamps: list[fx.Node] = []
    reader = only_reader(chain[-1])
    while reader is not None and reader not in taken and _is_clamp(reader) and may_absorb(chain[0], reader):
        clamps.append(reader)
        reader = only_reader(reader)
    return clamps


def _is_clamp(node: fx.Node) -> bool:
    op = operator_of(node)
    return op is not None and op.kind is Kind.CLAMP
