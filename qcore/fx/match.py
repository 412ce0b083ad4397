"""Finds the backend's patterns in a graph: one look at each node, by the operator that anchors a pattern."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from qcore.backend_config import BackendConfig, BackendPatternConfig, ObservationType
from qcore.fx.operators import Kind, activation_inputs, anchor_key, operator_of, pattern_keys


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

    def inputs(self) -> list[fx.Node]:
        """What the chain reads as activations from outside, in order."""
        inside = set(self.nodes)
        return [source for node in self.nodes for source in activation_inputs(node) if source not in inside]


class PatternTable:
    """A BackendConfig's patterns, by anchor; longer ones first, and of equal length those with a condition first."""

    def __init__(self, config: BackendConfig) -> None:
        self._by_anchor: dict[object, list[tuple[tuple[object, ...], BackendPatternConfig]]] = defaultdict(list)
        for pattern in config.configs:
            keys = pattern_keys(pattern.pattern)
            if pattern.observation_type is not ObservationType.INPUT_OUTPUT_NOT_OBSERVED:
                self._by_anchor[keys[0]].append((keys, pattern))
        for candidates in self._by_anchor.values():
            # A stable sort: of equal patterns, the one that was added last wins, as everywhere in a BackendConfig.
            candidates.reverse()
            candidates.sort(key=lambda item: (-len(item[0]), item[1].condition is None))

    def candidates(self, key: object) -> list[tuple[tuple[object, ...], BackendPatternConfig]]:
        """The patterns that begin with an operator."""
        return self._by_anchor.get(key, [])


def find_matches(
    graph: fx.Graph,
    table: PatternTable,
    module_types: dict[str, type[nn.Module]],
    may_absorb: Callable[[fx.Node, fx.Node], bool],
    accepts: Callable[[fx.Node, BackendPatternConfig], bool],
) -> list[Match]:
    """Cover the graph with patterns, first come first served, longest first.

    Args:
        graph: in normal form, with examples.
        table: the backend's patterns.
        module_types: classes of the leaf modules, by path.
        may_absorb: whether a clamp (second) may be absorbed by the quantize that follows a pattern (anchor first);
            asked only where nothing else reads the clamp's input.
        accepts: whether a pattern's dtype configs take the qconfig of an anchor; of several patterns that fit, the
            first that does is chosen, and the first of all if none does.

    Returns:
        The matches, in the order of their results: all that a match reads from other matches comes before it.
    """
    matches: list[Match] = []
    taken: set[fx.Node] = set()
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node in taken or node.op not in ("call_function", "call_method", "call_module"):
            continue
        fitting = [
            (chain, config)
            for keys, config in table.candidates(anchor_key(node, module_types))
            if (chain := _follow(node, keys, module_types, taken)) is not None
            and (config.condition is None or config.condition.holds(node))
        ]
        if not fitting:
            continue
        chain, config = fitting[0]
        if len(fitting) > 1:
            chain, config = next((item for item in fitting if accepts(node, item[1])), fitting[0])
        clamps = _absorbable(chain, taken, may_absorb) if _observes_output(config) else []
        matches.append(Match((*chain, *clamps), len(clamps) + _trailing_clamps(chain, config), config))
        taken.update(matches[-1].nodes)
    matches.sort(key=lambda match: position[match.result])
    return matches


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node`` as an activation; ``None`` if several do, or none, or the output."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if reader.op != "output" and node in activation_inputs(reader) else None


def _observes_output(config: BackendPatternConfig) -> bool:
    return config.observation_type is ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT


def _follow(
    node: fx.Node, keys: tuple[object, ...], module_types: dict[str, type[nn.Module]], taken: set[fx.Node]
) -> list[fx.Node] | None:
    chain = [node]
    for key in keys[1:]:
        reader = only_reader(chain[-1])
        if reader is None or reader in taken or anchor_key(reader, module_types) != key:
            return None
        if activation_inputs(reader).count(chain[-1]) != 1:
            return None  # x + x: the chain's own value is the other operand, too.
        others = [source for source in activation_inputs(reader) if source is not chain[-1]]
        op = operator_of(reader)
        if op is not None and len(op.activations) != 1 + len(others):
            return None  # An addition of a number is no addition of a residual.
        chain.append(reader)
    return chain


def _absorbable(
    chain: list[fx.Node], taken: set[fx.Node], may_absorb: Callable[[fx.Node, fx.Node], bool]
) -> list[fx.Node]:
    clamps: list[fx.Node] = []
    reader = only_reader(chain[-1])
    while reader is not None and reader not in taken and _is_clamp(reader) and may_absorb(chain[0], reader):
        clamps.append(reader)
        reader = only_reader(reader)
    return clamps


def _trailing_clamps(chain: list[fx.Node], config: BackendPatternConfig) -> int:
    """Clamps that the pattern itself names at its end; the same holds for them."""
    if not _observes_output(config):
        return 0
    count = 0
    while count < len(chain) - 1 and _is_clamp(chain[-1 - count]):
        count += 1
    return count


def _is_clamp(node: fx.Node) -> bool:
    op = operator_of(node)
    return op is not None and op.kind is Kind.CLAMP
