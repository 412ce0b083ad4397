"""What calibrating costs: a run of a prepared network against the float one, beside torch.ao's, interleaved.

Preparing folds batch norms, which alone makes a network faster; so the time is given against the float network as it is
and against one with its batch norms folded (``qcore.fuse_fx``), too. Every call gets other photos, in turn::

    python benchmarks/calibration.py
    python benchmarks/calibration.py --networks mobilenet_v2 --batches 1 --rounds 50
"""

import argparse
import itertools
import statistics
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, write
from benchmarks._interleaved import judged, measure, ratio, serve
from examples.photos import imagenet_photos
from examples.zoo import NETWORKS

FLOAT, FOLDED = "float", "float, folded"

#: Times the float network, by size of the batch.
BOUNDS = {1: 1.25, 8: 1.15}


def _prepared_by_torch_ao(model: nn.Module, example: Tensor, engine: str) -> nn.Module:
    """The baseline; the one place of this file that may import it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It announces on every call that it is deprecated.
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        torch.backends.quantized.engine = engine
        prepared: nn.Module = prepare_fx(model, get_default_qconfig_mapping(engine), (example,))
        return prepared


def build(contender: str, model: nn.Module, example: Tensor) -> nn.Module:
    """What a contender runs.

    Args:
        contender: ``FLOAT``, ``FOLDED``, ``qcore:BACKEND`` or ``torch.ao:ENGINE``.
        model: the float network.
        example: its input.
    """
    family, _, name = contender.partition(":")
    if family == "qcore":
        return qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(name), (example,))
    if family == "torch.ao":
        return _prepared_by_torch_ao(model, example, name)
    return qcore.fuse_fx(model) if contender == FOLDED else model


def _serve(contender: str, network: str, batch: int, calls: int, threads: int) -> None:
    torch.set_num_threads(threads)
    entry = NETWORKS[network]
    photos = entry.preprocess(torch.stack(imagenet_photos(entry.input_size)[0]))
    batches = [part.clone() for part in photos.split(batch) if len(part) == batch]
    model = build(contender, entry.build(), batches[0])
    given = itertools.cycle(batches)
    with torch.no_grad():
        serve(lambda: model(next(given)), calls)


def _rows(network: str, batch: int, times: dict[str, list[float]]) -> list[list[str]]:
    rows = []
    for contender, found in times.items():
        against = ratio(found, times[FLOAT])
        text = f"{against:.2f}x"
        if contender.startswith("qcore") and batch in BOUNDS:
            text = judged(against, BOUNDS[batch], text=text)
        folded = f"{ratio(found, times[FOLDED]):.2f}x"
        rows.append([network, str(batch), contender, f"{statistics.median(found):.1f}", text, folded])
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["mobilenet_v2", "efficientnet_lite0", "resnet50_augnet"]
    parser.add_argument("--networks", nargs="+", default=networks, choices=sorted(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--backends", nargs="+", default=["x86_onednn"], help="of qcore")
    parser.add_argument("--engines", nargs="*", default=["x86"], help="of torch.ao")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=3, help="calls in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve, options.networks[0], options.batches[0], options.calls, options.threads)
        return 0
    contenders = [FLOAT, FOLDED, *(f"qcore:{name}" for name in options.backends)]
    contenders += [f"torch.ao:{name}" for name in options.engines]
    rows = []
    for network, batch in itertools.product(options.networks, options.batches):
        print(f"measuring {network}, batch {batch} ...", file=sys.stderr, flush=True)
        common = ["--networks", network, "--batches", str(batch)]
        common += ["--calls", str(options.calls), "--threads", str(options.threads)]
        command = [sys.executable, "-W", "ignore", __file__, *common, "--serve"]
        rows += _rows(network, batch, measure({name: [*command, name] for name in contenders}, options.rounds))
    header = ["network", "batch", "contender", "ms", "against float", "against float, folded"]
    note = f"{options.threads} threads, {options.rounds} rounds of {options.calls} calls, medians; {machine_line()}"
    write(f"{markdown_table(header, rows)}\n\n{note}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
