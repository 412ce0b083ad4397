"""Random models on every backend: what the float model computes, every later stage has to compute.

Each seed is one model (``tests/random_graphs``); the same seed gives the same model on every machine. It prints what
doesn't hold, and the command that shows one of them alone::

    python benchmarks/fuzz.py --cases 10000
    python benchmarks/fuzz.py --first 4711 --cases 1 --source --backends fbgemm
"""

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from random_graphs.checks import CHECKS, Finding, check  # noqa: E402
from random_graphs.generate import random_graph  # noqa: E402
from rich.progress import track  # noqa: E402

import qcore  # noqa: E402
from benchmarks._common import machine_line, markdown_table  # noqa: E402
from qcore.plugins.manager import backend_names  # noqa: E402


def examined(job: tuple[int, tuple[str, ...]]) -> list[Finding]:
    """One model on some backends."""
    seed, backends = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    graph = random_graph(seed)
    return [finding for backend in backends for finding in check(graph, backend)]


def every_finding(jobs: Sequence[tuple[int, tuple[str, ...]]], processes: int) -> Iterator[list[Finding]]:
    """The findings of each model, in order."""
    if processes == 1:
        yield from map(examined, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(examined, jobs, chunksize=8)


def table(findings: Iterable[Finding], backends: Sequence[str]) -> str:
    """How many models each check found something about."""
    found = Counter((check, backend) for check, backend, _ in {(f.check, f.backend, f.seed) for f in findings})
    rows = [[name, *(str(found[name, backend]) for backend in backends)] for name in CHECKS]
    return markdown_table(["models wrong in", *backends], rows)


def main() -> None:
    """Run as many as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="how many models")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--backends", nargs="+", help="default: all that run here")
    parser.add_argument("--in-turn", action="store_true", help="each model on one backend only, in turn")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--source", action="store_true", help="print the models")
    options = parser.parse_args()
    names = options.backends or [name for name in backend_names() if qcore.get_backend(name).availability.ok]
    seeds = range(options.first, options.first + options.cases)
    jobs = [(seed, (names[seed % len(names)],) if options.in_turn else tuple(names)) for seed in seeds]
    start, findings = time.monotonic(), []
    for found in track(every_finding(jobs, options.processes), "models", total=len(jobs), disable=len(jobs) < 10):
        for finding in found:
            print(f"seed {finding.seed}, {finding.backend}, {finding.check}: {finding.what}")
        findings += found
    if options.source:
        for seed in seeds:
            print(f"\n# seed {seed}\n{random_graph(seed).source}")
    print(f"\n{machine_line()}")
    wrong = len({finding.seed for finding in findings})
    print(f"{len(jobs)} models, {wrong} of them wrong, in {time.monotonic() - start:.0f} s\n")
    print(table(findings, names))
    if findings:
        first = findings[0]
        print(f"\npython benchmarks/fuzz.py --first {first.seed} --cases 1 --source --backends {first.backend}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
