"""What preparing a network costs, against its symbolic trace by fx and one run of it on the example input.

Preparing runs the network twice (its own result, and the replay of the traced graph that proves it), traces it, folds
its batch norms, plans and inserts observers; after each pass its result is checked (``qcore/fx/verify.py``), and what
that costs is measured by leaving it out. Everything is timed in turn in one process, and the medians are compared::

    python benchmarks/prepare_cost.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, write
from examples.zoo import NETWORKS
from qcore.fx import prepare, verify

#: Times the trace and the run together.
BOUND = 2.5
#: With the checks, times without them.
CHECKS_BOUND = 1.1


def _milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _without_checks(function: Callable[[], Any]) -> None:
    """Call a function while the passes of prepare have no checks after them."""
    with ExitStack() as stack:
        for name in ("check_traced", "check_planned", "check_observed"):
            stack.enter_context(mock.patch.object(prepare, name, lambda *_: None))
        stack.enter_context(mock.patch.object(verify, "check_rewritten", lambda _graph, _before, run: run and run()))
        function()


def measure(network: str, backend: str, rounds: int) -> list[float]:
    """Median milliseconds of the symbolic trace, of one run, and of ``prepare_fx`` with its checks and without."""
    entry = NETWORKS[network]
    model = entry.build().eval()
    x = torch.randn(1, 3, entry.input_size, entry.input_size)
    mapping = qcore.get_default_qconfig_mapping(backend)

    def prepared() -> Any:
        return qcore.prepare_fx(model, mapping, (x,))

    steps: tuple[Callable[[], Any], ...] = (
        lambda: torch.fx.symbolic_trace(model),
        lambda: model(x),
        prepared,
        lambda: _without_checks(prepared),
    )
    taken: list[list[float]] = [[] for _ in steps]
    with torch.no_grad():
        for _ in range(rounds + 1):
            for times, step in zip(taken, steps, strict=True):
                times.append(_milliseconds(step))
    return [statistics.median(times[1:]) for times in taken]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["mobilenet_v2", "efficientnet_lite0", "resnet50_augnet"]
    parser.add_argument("--networks", nargs="+", default=networks, choices=sorted(NETWORKS))
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", help="a Markdown file to write the table to")
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        print(f"measuring {network} ...", file=sys.stderr)
        trace, run, checked, unchecked = measure(network, options.backend, options.rounds)
        ratios = ((checked / (trace + run), BOUND), (checked / unchecked, CHECKS_BOUND))
        judged = [f"{ratio:.2f} ({'meets' if ratio <= bound else 'misses'} {bound:g})" for ratio, bound in ratios]
        rows.append([network, f"{trace:.0f}", f"{run:.0f}", f"{checked:.0f}", *judged])
    header = ["network", "fx trace ms", "run ms", "prepare ms", "prepare / (trace + run)", "prepare / without checks"]
    write(f"{markdown_table(header, rows)}\n\n{options.rounds} rounds, medians; {machine_line()}", options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
