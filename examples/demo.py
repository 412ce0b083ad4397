"""Two ImageNet networks from float to int8 on every installed backend, by qcore's public API alone.

Weights and photos ship inside packages (``examples/requirements.txt``); nothing is downloaded at run time::

    python examples/demo.py
    python examples/demo.py --networks mobilenet_v2 --backends fbgemm --quick
"""

import argparse
import io
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks.metrics import agreement, sqnr_db
from examples.photos import evaluation_set, imagenet_photos
from examples.zoo import NETWORKS, MissingPackageError

CONSOLE = Console(width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True)
class Result:
    """One network on one backend, and what the table shows of it."""

    network: str
    backend: str
    model: nn.Module
    agreement: float
    sqnr_db: float
    milliseconds: float
    float_milliseconds: float
    megabytes: float
    float_megabytes: float


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs for many inputs, a few at a time."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in inputs.split(8)])


def size_on_disk(model: nn.Module) -> float:
    """Megabytes that the saved state takes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def latency(models: Sequence[nn.Module], example: Tensor, rounds: int) -> list[float]:
    """Median milliseconds of a call, each model in turn in every round."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for number in range(rounds + 3):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(example)
                if number >= 3:  # The first calls pack weights and warm caches.
                    taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def choose_backends(wanted: Sequence[str]) -> list[str]:
    """The backends that this machine can run, the reference backend last; says why others can't."""
    names = wanted or sorted((b.name for b in qcore.installed_backends()), key=lambda name: name == "reference")
    usable = []
    for name in names:
        try:
            found = qcore.get_backend(name).availability
        except qcore.errors.BackendError as error:  # A broken plugin stops nobody else.
            CONSOLE.print(f"  {name:12} not here: {error}", markup=False)
            continue
        CONSOLE.print(f"  {name:12} {found.isa if found.ok else f'not here: {found.reason}'}", markup=False)
        if found.ok:
            usable.append(name)
    return usable


def quantize(model: nn.Module, backend: str, photos: Tensor, label: str) -> nn.Module:
    """The whole way from float to integers."""
    mapping = qcore.get_default_qconfig_mapping(backend)
    prepared = qcore.prepare_fx(model, mapping, (photos[:1],))
    progress = partial(track, description=f"calibrating {label:34}", console=CONSOLE)
    qcore.calibrate(prepared, photos.split(1), progress=progress)
    return qcore.convert_fx(prepared)


def compare(network: str, backends: Sequence[str], images: list[Tensor], rounds: int) -> list[Result]:
    """One network on every backend."""
    entry = NETWORKS[network]
    model = entry.build()
    photos = entry.preprocess(torch.stack(imagenet_photos(entry.input_size)[0]))
    inputs = entry.preprocess(torch.stack(images))
    expected = run(model, inputs)
    converted = {name: quantize(model, name, photos, f"{network} for {name}") for name in backends}
    float_ms, *milliseconds = latency([model, *converted.values()], photos[:1], rounds)
    return [
        Result(
            network,
            name,
            quantized,
            agreement(expected, found := run(quantized, inputs)),
            sqnr_db(expected, found),
            taken,
            float_ms,
            size_on_disk(quantized),
            size_on_disk(model),
        )
        for (name, quantized), taken in zip(converted.items(), milliseconds, strict=True)
    ]


def print_table(results: Sequence[Result], images: str) -> None:
    """The table, and what it was measured on."""
    table = Table(title="int8 beside float", pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("network", "backend"):
        table.add_column(heading)
    for heading in ("same\nclass", "SQNR\ndB", "batch 1\nms", "speed", "on disk\nMB", "of\nfloat"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(results):
        is_last = number + 1 == len(results) or results[number + 1].network != row.network
        table.add_row(
            row.network,
            row.backend,
            f"{row.agreement:.3f}",
            f"{row.sqnr_db:.1f}",
            f"{row.milliseconds:.1f}",
            f"{row.float_milliseconds / row.milliseconds:.2f}x",
            f"{row.megabytes:.1f}",
            f"{row.megabytes / row.float_megabytes:.2f}",
            end_section=is_last,
        )
    CONSOLE.print(table)
    threads, isa = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    CONSOLE.print(
        "same class: share of images whose top class is the same; SQNR: of the logits; speed: of a float call to "
        f"an int8 call, above 1 is faster (torch {torch.__version__}, {threads} threads, {isa}). Calibrated on 20 "
        f"ImageNet photos, compared on {images}."
    )


def print_plans(results: Sequence[Result]) -> None:
    """What qcore decided: a line for each model, and a few rows of the first one's table."""
    CONSOLE.print("\nexplain(model).summary()")
    for row in results:
        CONSOLE.print(f"{row.network} on {qcore.explain(row.model).summary()}", highlight=False, markup=False)
    plan = qcore.explain(results[0].model)
    shown = replace(plan, decisions=(*plan.decisions[:10], *(d for d in plan.decisions[10:] if not d.quantized)))
    CONSOLE.print(f"\nexplain({results[0].network} for {results[0].backend}), the first rows and all that stay float")
    # Without the summary, which would count what is shown; the reasons and the table follow.
    text = re.split(r"\n(?=  \S|\n)", shown.as_text(CONSOLE.width), maxsplit=1)[1]
    CONSOLE.print(text, soft_wrap=True, highlight=False, markup=False)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Two ImageNet networks from float to int8 on every backend.")
    parser.add_argument(
        "--networks", nargs="+", default=["efficientnet_lite0", "mobilenet_v2"], choices=sorted(NETWORKS)
    )
    parser.add_argument("--backends", nargs="+", default=[], help="default: all that are installed")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="fewer images and fewer timed calls")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        evaluation = evaluation_set()
        images = evaluation.images[:: 5 if options.quick else 1]
        CONSOLE.print("backends on this machine:")
        backends = choose_backends(options.backends)
        if not backends:
            parser.error("none of these backends can run here; the reference backend runs everywhere")
        rounds = 5 if options.quick else 20
        results = [row for network in options.networks for row in compare(network, backends, images, rounds)]
    except (MissingPackageError, qcore.errors.QcoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(results, (f"{len(images)} of " if options.quick else "") + evaluation.description)
    print_plans(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
