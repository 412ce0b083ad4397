"""Accuracy of ``torch.ao.quantization``, the baseline that this project is measured against.

This file may import ``torch.ao.quantization``, as may the oracle tests and the one function for torch.ao in each of
``scale.py``, ``coverage.py``, ``sentences.py``, ``speakers.py``, ``calibration.py``, ``footprint.py`` and
``latency.py``, and nothing else of the project: it is the
contender, run through its own public recipe (FX graph mode, ``prepare_fx``/``convert_fx``, the engine's default qconfig
mapping).

Calibration: the 20 ImageNet photos of ``examples.photos``, one at a time (batch 1). Evaluation: the images
of ``examples.photos.evaluation_set``, compared with the float network. Run it in a process of its own,
since the quantized engine is a setting of the whole process::

    python benchmarks/accuracy_torch_ao.py --network mobilenet_v2 --engine x86 --json
"""

import argparse
import json
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Run as a script, Python looks beside the script only; `examples` and `benchmarks` are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.metrics import agreement, sqnr_db
from examples.photos import evaluation_set, imagenet_photos
from examples.zoo import NETWORKS, MissingPackageError

ENGINES = ("x86", "onednn", "qnnpack", "fbgemm")


def quantize(model: nn.Module, calibration: list[Tensor], engine: str) -> nn.Module:
    """Quantizes a network as torch.ao's documentation does, with the default mapping of ``engine``.

    Args:
        model: Float network in eval mode; it is copied, not changed.
        calibration: Batches to run through it.
        engine: One of ``ENGINES``; becomes the process's ``torch.backends.quantized.engine``.

    Returns:
        The converted network.
    """
    with warnings.catch_warnings():
        # torch.ao announces on every call that it is deprecated, which is known.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = engine
        prepared = prepare_fx(model, get_default_qconfig_mapping(engine), (calibration[0],))
        with torch.no_grad():
            for batch in calibration:
                prepared(batch)
        converted: nn.Module = convert_fx(prepared)
    return converted


def run(model: nn.Module, inputs: Tensor, batch_size: int = 16) -> Tensor:
    """Outputs of a network for all inputs, computed a few images at a time."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in torch.split(inputs, batch_size)])


def evaluate(engine: str, network: str, *, calibration_batch: int = 1, mirrored: bool = False) -> dict[str, Any]:
    """Calibrates, quantizes and evaluates one network on one engine.

    Args:
        engine: One of ``ENGINES``.
        network: A key of ``examples.zoo.NETWORKS``.
        calibration_batch: Images per calibration batch; torch.ao's histograms depend on it a little.
        mirrored: Evaluate on the mirror images of the cutouts too.

    Returns:
        A JSON-ready dictionary. ``agreement`` and ``sqnr_db`` are the result; ``float_top1`` and
        ``top1`` are None where the evaluation set has no labels; the rest says what was measured.

    Raises:
        ValueError: This build of torch lacks the engine, or the network is unknown.
        MissingPackageError: The weights or the photos are not installed.
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; there are {', '.join(NETWORKS)}")
    if engine not in ENGINES or engine not in torch.backends.quantized.supported_engines:
        raise ValueError(f"this build of torch has no quantized engine {engine!r}")
    entry = NETWORKS[network]
    model = entry.build()
    photos, _ = imagenet_photos(entry.input_size)
    evaluation = evaluation_set(entry.input_size, mirrored=mirrored)
    inputs = entry.preprocess(torch.stack(evaluation.images))

    started = time.perf_counter()
    calibration = list(torch.split(entry.preprocess(torch.stack(photos)), calibration_batch))
    quantized = quantize(model, calibration, engine)
    quantize_seconds = time.perf_counter() - started

    float_logits = run(model, inputs)
    logits = run(quantized, inputs)
    return {
        "contender": "torch.ao",
        "engine": engine,
        "network": network,
        "agreement": agreement(float_logits, logits),
        "sqnr_db": sqnr_db(float_logits, logits),
        "float_top1": evaluation.top1(float_logits),
        "top1": evaluation.top1(logits),
        "evaluation_set": evaluation.name,
        "evaluation_images": len(evaluation.images),
        "evaluation_independent": evaluation.independent,
        "calibration_images": len(photos),
        "calibration_batch": calibration_batch,
        "quantize_seconds": round(quantize_seconds, 3),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status, 2 when something that it needs is not installed."""
    parser = argparse.ArgumentParser(description="Accuracy of torch.ao.quantization on one network and engine.")
    parser.add_argument("--network", choices=sorted(NETWORKS), required=True)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--calibration-batch", type=int, default=1, metavar="N")
    parser.add_argument("--mirrored", action="store_true", help="evaluate on mirror images of the cutouts too")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of text")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    try:
        result = evaluate(
            options.engine,
            options.network,
            calibration_batch=options.calibration_batch,
            mirrored=options.mirrored,
        )
    except (MissingPackageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:24}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
