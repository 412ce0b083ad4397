"""Latency of converted networks beside torch.ao and float, interleaved in one run, one process for each contender.

The contenders load and convert once; then they are called in turn, round after round, so that whatever else the machine
does hits all of them alike. Printed are medians over the rounds, and ratios of a contender to its rival in torch.ao::

    python benchmarks/latency.py
    python benchmarks/latency.py --networks mobilenet_v2 --batches 1 --rounds 50
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import machine_line, markdown_table, write
from examples.photos import imagenet_photos
from examples.zoo import NETWORKS

#: Contender, its rival, and the ratio to reach on each network.
RIVALS: dict[str, tuple[str, dict[str, float]]] = {
    "qcore:x86_onednn": ("torch.ao:x86", {"mobilenet_v2": 0.95, "resnet50_augnet": 1.05}),
    "qcore:fbgemm": ("torch.ao:fbgemm", {"mobilenet_v2": 0.9, "resnet50_augnet": 1.05}),
    "qcore:qnnpack": ("torch.ao:qnnpack", {}),
}


def build(contender: str, network: str) -> tuple[nn.Module, Tensor]:
    """The model of a contender, and calibration photos.

    Args:
        contender: ``float``, ``qcore:BACKEND`` or ``torch.ao:ENGINE``.
        network: a key of ``examples.zoo.NETWORKS``.
    """
    entry = NETWORKS[network]
    model = entry.build()
    photos = entry.preprocess(torch.stack(imagenet_photos(entry.input_size)[0]))
    family, _, name = contender.partition(":")
    if family == "qcore":
        import qcore

        prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(name), (photos[:1],))
        qcore.calibrate(prepared, photos[:8].split(1))
        return qcore.convert_fx(prepared), photos
    if family == "torch.ao":
        from benchmarks.accuracy_torch_ao import quantize

        return quantize(model, list(photos[:8].split(1)), name), photos
    return model, photos


def serve(contender: str, network: str, batch: int, calls: int, threads: int) -> None:
    """Answer every line on standard input by the median milliseconds of ``calls`` calls."""
    torch.set_num_threads(threads)
    model, photos = build(contender, network)
    x = photos[:batch].contiguous()
    with torch.no_grad():
        for _ in range(3):
            model(x)
        print("ready", flush=True)
        for _ in sys.stdin:
            taken = []
            for _ in range(calls):
                start = time.perf_counter()
                model(x)
                taken.append((time.perf_counter() - start) * 1e3)
            print(statistics.median(taken), flush=True)


def measure(
    contenders: list[str], network: str, batch: int, rounds: int, calls: int, threads: int
) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round."""
    workers: dict[str, subprocess.Popen[str]] = {}
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    try:
        for contender in contenders:
            command = [sys.executable, "-W", "ignore", __file__, "--serve", contender, "--networks", network]
            command += ["--batches", str(batch), "--calls", str(calls), "--threads", str(threads)]
            pipe = subprocess.PIPE
            workers[contender] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            if _line(workers[contender]) != "ready":
                raise RuntimeError(f"{contender} can't be built for {network}; run it alone with --serve {contender}")
        for _ in range(rounds):
            for contender, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                times[contender].append(float(_line(worker)))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return times


def _line(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet50_augnet"], choices=sorted(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=4, help="calls in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backends", nargs="+", default=["x86_onednn", "fbgemm", "qnnpack"], help="of qcore")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.networks[0], options.batches[0], options.calls, options.threads)
        return 0
    wanted = [f"qcore:{backend}" for backend in options.backends]
    contenders = ["float", *(name for own in wanted for name in (own, RIVALS[own][0]))]
    rows = []
    for network in options.networks:
        for batch in options.batches:
            print(f"measuring {network}, batch {batch} ...", file=sys.stderr, flush=True)
            times = measure(contenders, network, batch, options.rounds, options.calls, options.threads)
            medians = {name: statistics.median(found) for name, found in times.items()}
            for name in contenders:
                rival, targets = RIVALS.get(name, ("", {}))
                against = ""
                if rival:
                    # Rounds are paired, so a slow moment counts for both.
                    pairs = zip(times[name], times[rival], strict=True)
                    ratio = statistics.median(own / other for own, other in pairs)
                    against = f"{ratio:.2f} of {rival}"
                    if network in targets:
                        against += f" ({'meets' if ratio <= targets[network] else 'MISSES'} {targets[network]})"
                speed = f"{medians['float'] / medians[name]:.2f}x"
                rows.append([network, str(batch), name, f"{medians[name]:.2f}", speed, against])
    header = ["network", "batch", "contender", "ms", "against float", "against its rival"]
    note = f"{options.threads} threads, {options.rounds} rounds of {options.calls} calls, medians; {machine_line()}"
    write(f"{markdown_table(header, rows)}\n\n{note}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
