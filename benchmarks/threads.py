"""Two threads prepare, one converts, two serve, all in one process: nothing may differ from what one thread computes.

What is served: float models, converted ones, and random numbers of the process, which nobody may rewind::

    python benchmarks/threads.py --seconds 60
"""

import argparse
import copy
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from random_graphs.generate import RandomGraph, random_graph  # noqa: E402
from rich.progress import track  # noqa: E402

import qcore  # noqa: E402
from benchmarks._common import machine_line, markdown_table  # noqa: E402
from qcore.errors import GuardError, QcoreError  # noqa: E402

#: Random models that are prepared, converted and served.
MODELS = 40


@dataclass(eq=False)
class Model:
    """A model with what one thread makes of it.

    Attributes:
        graph: the random model.
        float_model: built of it.
        mapping: what it is prepared with.
        prepared: calibrated.
        converted: from that.
        wanted: what each gives on the same inputs.
    """

    graph: RandomGraph
    float_model: nn.Module
    mapping: qcore.QConfigMapping
    prepared: nn.Module
    converted: nn.Module
    wanted: dict[str, Any]


@dataclass
class Tally:
    """What the threads did, and what went wrong."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, problem: str = "") -> None:
        """Count something that was done, and what was wrong with it."""
        with self.lock:
            self.done[what] += 1
            if problem:
                self.wrong.append(f"{what}: {problem}")


def outputs(model: nn.Module, graph: RandomGraph) -> Any:
    """What a copy of a model gives; a copy, as some models keep state."""
    with torch.no_grad():
        return copy.deepcopy(model)(*graph.inputs(2, 3))


def prepared_of(graph: RandomGraph, model: nn.Module, mapping: qcore.QConfigMapping, backend: str) -> nn.Module:
    """A model prepared and calibrated."""
    found = qcore.prepare_fx(model, mapping, graph.inputs(), backend=backend, on_unsupported="ignore")
    with torch.no_grad():
        found(*graph.inputs(2, 1))
    return found


def model_of(seed: int, backend: str) -> Model | None:
    """The model of a seed, if it can be prepared at all."""
    graph = random_graph(seed)
    model, mapping = graph.build(), qcore.get_default_qconfig_mapping(backend)
    try:
        prepared = prepared_of(graph, model, mapping, backend)
        converted = qcore.convert_fx(prepared)
        wanted = {"float": outputs(model, graph), "prepared": outputs(prepared, graph)}
        wanted["converted"] = outputs(converted, graph)
    except (QcoreError, GuardError):
        return None
    return Model(graph, model, mapping, prepared, converted, wanted)


def difference(wanted: Any, found: Any) -> str:
    """Empty if two results have the same bits."""
    first, second = tree_leaves(wanted), tree_leaves(found)
    same = len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )
    return "" if same else "other bits than in one thread"


def run(models: list[Model], backend: str, seconds: float) -> Tally:
    """All threads for a while."""
    tally, over = Tally(), threading.Event()

    def thread(what: str, work: Callable[[Model], str]) -> threading.Thread:
        def loop() -> None:
            number = 0
            while not over.is_set():
                model = models[number % len(models)]
                number += 1
                try:
                    tally.note(what, work(model))
                except Exception as error:
                    tally.note(what, f"{type(error).__name__}: {error} (seed {model.graph.seed})")

        return threading.Thread(target=loop)

    def prepare(model: Model) -> str:
        found = prepared_of(model.graph, model.float_model, model.mapping, backend)
        return difference(model.wanted["prepared"], outputs(found, model.graph))

    def convert(model: Model) -> str:
        return difference(model.wanted["converted"], outputs(qcore.convert_fx(model.prepared), model.graph))

    drawn: set[float] = set()

    def serve(model: Model) -> str:
        found = float(torch.rand((), dtype=torch.float64))
        with tally.lock:
            is_old = found in drawn
            drawn.add(found)
        problem = difference(model.wanted["float"], outputs(model.float_model, model.graph))
        problem = problem or difference(model.wanted["converted"], outputs(model.converted, model.graph))
        return problem or ("a random number came twice" if is_old else "")

    jobs = [("prepare", prepare)] * 2 + [("convert", convert)] + [("serve", serve)] * 2
    threads = [thread(what, work) for what, work in jobs]
    for started in threads:
        started.start()
    for _ in track(range(round(10 * seconds)), "five threads"):
        time.sleep(0.1)
    over.set()
    for started in threads:
        started.join()
    return tally


def main() -> None:
    """Run, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--backend", help="default: the best that runs here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend = str(options.backend or qcore.get_default_qconfig_mapping().backend)
    models = [model for seed in range(MODELS) if (model := model_of(seed, backend)) is not None]
    tally = run(models, backend, options.seconds)
    print(f"\n{machine_line()}; {backend}, {len(models)} models\n")
    wrong = Counter(text.partition(":")[0] for text in tally.wrong)
    rows = [[what, str(tally.done[what]), str(wrong[what])] for what in ("prepare", "convert", "serve")]
    print(markdown_table(["threads that", "did it times", "wrong"], rows))
    for text, number in Counter(tally.wrong).most_common(10):
        print(f"{number} times: {text}")
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
