"""Latency of converted networks beside float, torch.ao and ONNX Runtime, interleaved, one process for each contender.

The contenders load and convert once; then they are called in turn, round after round, so that whatever else the machine
does hits all of them alike. Printed are medians over the rounds, and speed-ups: the median over paired rounds of how
many times as long the other takes::

    python benchmarks/latency.py
    python benchmarks/latency.py --networks mobilenet_v2 --batches 1 --rounds 50
    python benchmarks/latency.py --onnxruntime-python other-environment/bin/python

torch.ao's contenders are its engines with their default mappings in FX graph mode. It can't trace the transformer
``minilm``, whose linear layers it quantizes dynamically. ONNX Runtime takes part where its Python has it, with onnx.
"""

import argparse
import importlib.util
import itertools
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import machine_line, markdown_table, write
from benchmarks._interleaved import judged, measure, ratio, serve
from benchmarks.mobilenet_v3 import mobilenet_v3_large
from examples.photos import imagenet_photos
from examples.text import minilm
from examples.zoo import NETWORKS, Network, preprocess_imagenet

FLOAT, ONNX_RUNTIME, BEST = "float", "onnxruntime", "torch.ao's best"
CALIBRATION_BATCHES = 8
TOKENS = 128

#: The speed-up to reach over a rival, by contender, network and batch.
BOUNDS: dict[tuple[str, str, int], dict[str, float]] = {
    ("qcore:x86_onednn", "mobilenet_v2", 1): {"torch.ao:x86": 1.9},
    ("qcore:x86_onednn", "mobilenet_v2", 8): {"torch.ao:x86": 1.5, ONNX_RUNTIME: 1.0},
    ("qcore:x86_onednn", "mobilenet_v3_large", 1): {"torch.ao:x86": 1.6, ONNX_RUNTIME: 1.0},
    ("qcore:x86_onednn", "resnet50_augnet", 1): {"torch.ao:x86": 1.12},
    ("qcore:x86_onednn", "resnet50_augnet", 8): {"torch.ao:x86": 1.03},
    ("qcore:x86_onednn", "efficientnet_lite0", 1): {BEST: 1.0},
    ("qcore:x86_onednn", "efficientnet_lite0", 8): {BEST: 1.0},
    ("qcore:x86_onednn", "minilm", 1): {BEST: 1.0, FLOAT: 1.3},
    ("qcore:fbgemm", "mobilenet_v2", 1): {"torch.ao:fbgemm": 1.3},
    ("qcore:qnnpack", "mobilenet_v2", 1): {"torch.ao:qnnpack": 1.0},
    ("qcore:qnnpack", "resnet50_augnet", 1): {"torch.ao:qnnpack": 1.0},
}
#: Whom a contender is compared with where no bound is set.
RIVALS = {"qcore:x86_onednn": "torch.ao:x86", "qcore:fbgemm": "torch.ao:fbgemm", "qcore:qnnpack": "torch.ao:qnnpack"}


@dataclass(frozen=True)
class Subject:
    """A float model and what it is given.

    Attributes:
        model: in evaluation mode.
        inputs: calibration data, one image or text each.
    """

    model: nn.Module
    inputs: list[tuple[Tensor, ...]]

    def batch(self, size: int) -> tuple[Tensor, ...]:
        """The inputs of one call."""
        columns = zip(*(self.inputs[number % len(self.inputs)] for number in range(size)), strict=True)
        return tuple(torch.cat(column) for column in columns)


def _of_photos(network: Network) -> Subject:
    photos = network.preprocess(torch.stack(imagenet_photos(network.input_size)[0][:CALIBRATION_BATCHES]))
    return Subject(network.build(), [(photo,) for photo in photos.split(1)])


def _of_tokens() -> Subject:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (CALIBRATION_BATCHES, TOKENS), generator=generator)
    return Subject(minilm(), [(one, torch.ones_like(one)) for one in ids.split(1)])


_IMAGES = [*NETWORKS.values(), Network("mobilenet_v3_large", mobilenet_v3_large, preprocess_imagenet, 224)]
SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{network.name: partial(_of_photos, network) for network in _IMAGES},
    "minilm": _of_tokens,
}


def _quantize_torch_ao(subject: Subject, engine: str) -> nn.Module:
    """The baseline; the one place of this file that may import it."""
    if any(isinstance(module, nn.Conv2d) for module in subject.model.modules()):
        from benchmarks.accuracy_torch_ao import quantize

        return quantize(subject.model, [one for (one,) in subject.inputs], engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It announces on every call that it is deprecated.
        from torch.ao.quantization import quantize_dynamic

        torch.backends.quantized.engine = engine
        dynamic: nn.Module = quantize_dynamic(subject.model, {nn.Linear}, dtype=torch.qint8)
        return dynamic


def build(contender: str, subject: Subject) -> nn.Module:
    """The model of a contender.

    Args:
        contender: ``FLOAT``, ``qcore:BACKEND`` or ``torch.ao:ENGINE``.
        subject: what to quantize.
    """
    family, _, name = contender.partition(":")
    if family == "qcore":
        import qcore

        mapping = qcore.get_default_qconfig_mapping(name)
        prepared = qcore.prepare_fx(subject.model, mapping, subject.inputs[0])
        qcore.calibrate(prepared, subject.inputs)
        return qcore.convert_fx(prepared)
    return _quantize_torch_ao(subject, name) if family == "torch.ao" else subject.model


def _serve(contender: str, network: str, batch: int, calls: int, threads: int) -> None:
    torch.set_num_threads(threads)
    subject = SUBJECTS[network]()
    model, x = build(contender, subject), subject.batch(batch)
    with torch.no_grad():
        serve(lambda: model(*x), calls)


def compared(contender: str, network: str, batch: int, times: dict[str, list[float]]) -> str:
    """The speed-ups of a contender over its rivals, with the bounds on them."""
    bounds = BOUNDS.get((contender, network, batch), {})
    engines = [name for name in times if name.startswith("torch.ao:")]
    cells = []
    for rival in dict.fromkeys([*bounds, *([RIVALS[contender]] if contender in RIVALS else [])]):
        other = rival
        if rival == BEST and engines:
            other = min(engines, key=lambda name: statistics.median(times[name]))
        if other not in times:
            cells += [f"{rival} isn't here"] if rival in bounds else []
            continue
        faster = ratio(times[other], times[contender])
        text = f"{faster:.2f}x {rival}" + (f", {other.partition(':')[2]}" if other != rival else "")
        cells.append(judged(faster, bounds[rival], text=text, at_most=False) if rival in bounds else text)
    return "; ".join(cells)


def _commands(options: argparse.Namespace, network: str, batch: int, directory: str) -> dict[str, list[str]]:
    contenders = [FLOAT, *(f"qcore:{name}" for name in options.backends), *(f"torch.ao:{e}" for e in options.engines)]
    figures = ["--calls", str(options.calls), "--threads", str(options.threads)]
    common = [sys.executable, "-W", "ignore", __file__, "--networks", network, "--batches", str(batch), *figures]
    commands = {contender: [*common, "--serve", contender] for contender in contenders}
    python = options.onnxruntime_python
    if python is None and importlib.util.find_spec("onnxruntime"):
        python = sys.executable
    if python:
        # Its environment needn't have the packages that hold the weights.
        path = f"{directory}/{network}_{batch}.pt"
        subject = SUBJECTS[network]()
        torch.save({"model": subject.model, "inputs": subject.inputs, "example": subject.batch(batch)}, path)
        script = str(Path(__file__).with_name("onnx_runtime.py"))
        commands[ONNX_RUNTIME] = [python, "-W", "ignore", script, path, str(options.calls), str(options.threads)]
    return commands


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=sorted(SUBJECTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=6, help="calls in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backends", nargs="+", default=["x86_onednn", "fbgemm", "qnnpack"], help="of qcore")
    parser.add_argument("--engines", nargs="*", default=["x86", "onednn", "fbgemm", "qnnpack"], help="of torch.ao")
    parser.add_argument(
        "--onnxruntime-python", help="a Python that has onnxruntime, onnx and torch (default: this one)"
    )
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--serve", metavar="CONTENDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve, options.networks[0], options.batches[0], options.calls, options.threads)
        return 0
    rows = []
    for network, batch in itertools.product(options.networks, options.batches):
        if network == "minilm" and batch != 1:
            continue  # Sentences are embedded one by one here.
        print(f"measuring {network}, batch {batch} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as directory:
            commands = _commands(options, network, batch, directory)
            times = measure(commands, options.rounds)
        rows += [[network, str(batch), name, "can't run", "", ""] for name in commands if name not in times]
        for name, found in times.items():
            speed = f"{ratio(times[FLOAT], found):.2f}x"
            against = compared(name, network, batch, times)
            rows.append([network, str(batch), name, f"{statistics.median(found):.2f}", speed, against])
    header = ["network", "batch", "contender", "ms", "against float", "speed-up over its rivals"]
    note = f"{options.threads} threads, {options.rounds} rounds of {options.calls} calls, medians; {machine_line()}"
    write(f"{markdown_table(header, rows)}\n\n{note}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
