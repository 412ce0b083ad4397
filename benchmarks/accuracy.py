"""Accuracy after post-training quantization, beside torch.ao: agreement of the top class and SQNR of the logits.

Every cell is a process of its own: default mapping of the backend, calibrated on the 20 ImageNet photos, compared with
the float network on the photo cut-outs (or crops, where Debian's package isn't installed)::

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --networks mobilenet_v2 --backends fbgemm --no-torch-ao
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, run_json, write
from benchmarks.metrics import agreement, sqnr_db
from examples.photos import evaluation_set, imagenet_photos
from examples.zoo import NETWORKS

#: What is asked of a backend: agreement, and SQNR in dB.
TARGETS = {
    ("efficientnet_lite0", "x86_onednn"): (0.94, 18.5),
    ("efficientnet_lite0", "qnnpack"): (0.94, 18.5),
    ("efficientnet_lite0", "fbgemm"): (0.90, 15.0),
    ("mobilenet_v2", "x86_onednn"): (0.91, 14.0),
    ("mobilenet_v2", "qnnpack"): (0.91, 14.0),
    ("mobilenet_v2", "fbgemm"): (0.89, 13.0),
}


def evaluate(network: str, backend: str) -> dict[str, Any]:
    """Quantize a network for a backend and compare it with the float network.

    Args:
        network: a key of ``examples.zoo.NETWORKS``.
        backend: an installed backend.
    """
    entry = NETWORKS[network]
    model = entry.build()
    photos = entry.preprocess(torch.stack(imagenet_photos(entry.input_size)[0]))
    evaluation = evaluation_set(entry.input_size)
    inputs = entry.preprocess(torch.stack(evaluation.images))
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), (photos[:1],))
    qcore.calibrate(prepared, photos.split(1))
    quantized = qcore.convert_fx(prepared)
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in inputs.split(16)])
        found = torch.cat([quantized(batch) for batch in inputs.split(16)])
    return {
        "agreement": agreement(expected, found),
        "sqnr_db": sqnr_db(expected, found),
        "evaluation": evaluation.description,
    }


def _cell(result: dict[str, Any] | None, target: tuple[float, float] | None) -> str:
    if result is None:
        return "not here"
    text = f"{result['agreement']:.3f}, {result['sqnr_db']:.1f} dB"
    if target is None:
        return text
    is_met = result["agreement"] >= target[0] and result["sqnr_db"] >= target[1]
    return f"{text} ({'meets' if is_met else 'MISSES'} {target[0]:.2f}, {target[1]:g} dB)"


def _run(script: str, *arguments: str) -> dict[str, Any] | None:
    # One contender that can't run here, such as FBGEMM on ARM, costs its cell and no other.
    try:
        return run_json(script, *arguments)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=["efficientnet_lite0", "mobilenet_v2"], choices=sorted(NETWORKS)
    )
    parser.add_argument("--backends", nargs="+", default=["x86_onednn", "qnnpack", "fbgemm", "reference"])
    parser.add_argument("--engines", nargs="*", default=["x86", "onednn", "qnnpack", "fbgemm"], help="of torch.ao")
    parser.add_argument("--no-torch-ao", action="store_true")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--contender", nargs=2, metavar=("NETWORK", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        torch.set_num_threads(1)  # As for torch.ao: sums may differ in the last bit by the number of threads.
        print(json.dumps(evaluate(*options.contender)))
        return 0
    columns = list(options.networks)
    rows, evaluation = [], ""
    for backend in options.backends:
        cells = []
        for network in columns:
            result = _run("accuracy.py", "--contender", network, backend)
            cells.append(_cell(result, TARGETS.get((network, backend))))
            evaluation = result["evaluation"] if result else evaluation
        rows.append([f"qcore {backend}", *cells])
    for engine in [] if options.no_torch_ao else options.engines:
        results = [_run("accuracy_torch_ao.py", "--network", n, "--engine", engine, "--json") for n in columns]
        rows.append([f"torch.ao {engine}", *(_cell(result, None) for result in results)])
    table = markdown_table(["", *columns], rows)
    legend = "agreement of the top class and SQNR of the logits against float; calibrated on 20 ImageNet photos;"
    write(f"{table}\n\n{legend}\nmeasured on {evaluation}\n{machine_line()}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
