"""Random models, each on one backend in turn: 300 with fixed seeds. ``benchmarks/fuzz.py`` runs as many as you like."""

import sys
from pathlib import Path

import pytest
import torch

# Test modules are imported without their directory on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qcore.fx.inplace import writes_in_place
from qcore.fx.operators import FORMS as KNOWN_FORMS
from qcore.fx.operators import MODULES, Operator, pattern_keys
from qcore.plugins.manager import backend_names, get_backend
from random_graphs.checks import check
from random_graphs.forms import FORMS
from random_graphs.generate import RandomModel, random_graph

CASES = 300


def backends():
    """Those that run here, each as often as another."""
    return [name for name in backend_names() if get_backend(name).availability.ok]


@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_model_is_right_at_every_stage(seed):
    names = backends()
    graph = random_graph(seed)
    findings = check(graph, names[seed % len(names)])
    assert not findings, "\n".join([*(f"{f.backend}, {f.check}: {f.what}" for f in findings), "", graph.source])


def test_a_seed_is_always_the_same_model():
    first, second = random_graph(7), random_graph(7)
    assert first == second
    assert isinstance(first.build(), RandomModel)


def known_forms():
    """Every (operator, kind) of qcore's tables."""
    for target in (*KNOWN_FORMS, *MODULES):
        (key,) = pattern_keys(target)
        if not isinstance(key, Operator) or (isinstance(target, str) and not hasattr(torch.Tensor, target)):
            continue
        if target in MODULES:
            yield key.name, "module"
        elif isinstance(target, str):
            yield key.name, "inplace" if writes_in_place(target, {}) else "method"
        else:
            yield key.name, "inplace" if writes_in_place(target, {}) else "function"


def test_every_operator_of_qcore_is_drawn_in_every_form():
    wanted = set(known_forms())
    assert wanted <= set(FORMS)
    drawn = set().union(*(random_graph(seed).used for seed in range(4 * CASES)))
    assert wanted <= drawn
