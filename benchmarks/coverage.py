"""Coverage: how many architectures come through prepare, calibrate, convert and run, beside torch.ao.

All of torchvision's model families and small transformers with random weights (``coverage_models.py``). Every pair of
a model and a contender is a process of its own, with a time limit. Needs ``requirements-coverage.txt``::

    python benchmarks/coverage.py --results coverage.jsonl              # minutes; run again to resume
    python benchmarks/coverage.py --results coverage.jsonl --only 'bert|resnet' --backends x86_onednn --no-torch-ao

What a cell says: the share of the weights of convolutions and linear layers that are stored as int8, and the SQNR of
the outputs against the float model, over all their float tensors together (integers, such as labels, are left out; of
detectors, the scores that they rank are compared, see ``Case.compared``); or the stage that failed, the error's class
and its first line. The weights are random, so an SQNR is a check on plausibility and no measure of accuracy. Networks
are as their constructors leave them, whose activations may fade to 1e-9; ``--settle-batch-norms`` gives batch norms the
statistics of a few random batches first, which makes every network amplify what is small, rounding included. The
default mapping of each contender is used; calibration is three random batches.

This file is a contender of torch.ao's like ``accuracy_torch_ao.py``: only its worker imports ``torch.ao.quantization``.
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import ROOT, machine_line, markdown_table, write
from benchmarks.coverage_models import CASES, FAMILIES, OUTPUTS, Case, Inputs
from benchmarks.metrics import sqnr_db
from benchmarks.weights import int8_share

TORCH_AO = "torch.ao"
TORCH_AO_ENGINE = "x86"
CALIBRATION_BATCHES = 3
NORM_BATCHES = 3
#: An SQNR that random weights reach when nothing is wrong.
PLAUSIBLE_DB = 10.0
_SHOWN = 90
_SETTLE = "QCORE_COVERAGE_SETTLE_BATCH_NORMS"

Result = dict[str, Any]


# ------------------------------------------------------------------------------
# One model, one contender: in a process of its own
# ------------------------------------------------------------------------------


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for positional or keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def settle_batch_norms(model: nn.Module, case: Case) -> None:
    """Give every batch norm the mean statistics of a few random batches; all else stays in evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # The mean over all batches.
        norm.train()
    if norms:
        with torch.no_grad():
            for _ in range(NORM_BATCHES):
                call(model, _wider(case.inputs()))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _wider(inputs: Inputs) -> Inputs:
    # Twice the batch: a batch norm in training mode behind a global average needs more than one value per channel.
    # Sequences and single images of detectors keep their shape.
    widened: Inputs = pytree.tree_map(lambda x: torch.cat([x, x.roll(1, dims=-1)]) if x.ndim > 3 else x, inputs)
    return widened


class _RankedScores(TorchDispatchMode):
    """Keeps what goes into every top-k; works on any form of a model, since it sees operators and not modules."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scores: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.topk.default:
            self.scores.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def observed(model: nn.Module, case: Case, inputs: Inputs) -> list[Tensor]:
    """The float tensors on which contenders are compared."""
    with torch.no_grad():
        if case.compared == OUTPUTS:
            leaves = pytree.tree_leaves(call(model, inputs))
        else:
            with _RankedScores() as ranked:
                call(model, inputs)
            leaves = ranked.scores
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Result:
    """SQNR over all tensors together; None, with the reason, where they can't be compared."""
    shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        return {"sqnr_db": None, "note": f"float has outputs of shapes {shapes[0]}, found {shapes[1]}"[:300]}
    if not expected:
        return {"sqnr_db": None, "note": "no float outputs"}
    signal, output = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (expected, found))
    finite = signal.isfinite()  # Masks of scores may be infinite on purpose.
    if not output[finite].isfinite().all():
        return {"sqnr_db": None, "note": "outputs aren't finite"}
    return {"sqnr_db": sqnr_db(signal[finite], output[finite])}


def quantize_qcore(model: nn.Module, batches: list[Inputs], backend: str, at: Callable[[str], None]) -> nn.Module:
    """With the backend's default mapping."""
    at("import")
    import qcore

    at("prepare")
    mapping = qcore.get_default_qconfig_mapping(backend)
    prepared = qcore.prepare_fx(model, mapping, batches[0])
    at("calibrate")
    with torch.no_grad():
        for batch in batches:
            call(prepared, batch)
    at("convert")
    return qcore.convert_fx(prepared)


def quantize_torch_ao(model: nn.Module, batches: list[Inputs], engine: str, at: Callable[[str], None]) -> nn.Module:
    """The baseline, by its own recipe; the one place of this file that may import it."""
    at("import")
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = engine
    at("prepare")
    example = tuple(batches[0].values()) if isinstance(batches[0], dict) else batches[0]
    prepared = prepare_fx(model, get_default_qconfig_mapping(engine), example)
    at("calibrate")
    with torch.no_grad():
        for batch in batches:
            call(prepared, batch)
    at("convert")
    converted: nn.Module = convert_fx(prepared)
    return converted


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    # "several problems:" says nothing without the first of them.
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _last_frame(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    frame = frames[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} in {frame.name}"


def measure(name: str, contender: str) -> Result:
    """Take a model through everything; never raises, since an error is the result."""
    case = CASES[name]
    stage = "build"

    def at(reached: str) -> None:
        nonlocal stage
        stage = reached

    result: Result = {}
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = case.build()
        if os.environ.get(_SETTLE):
            settle_batch_norms(model, case)
        batches = [case.inputs() for _ in range(CALIBRATION_BATCHES)]
        evaluation = case.inputs()
        expected = observed(model, case, evaluation)
        if contender == TORCH_AO:
            converted = quantize_torch_ao(model, batches, TORCH_AO_ENGINE, at)
        else:
            converted = quantize_qcore(model, batches, contender, at)
        at("run")
        result = {"status": "runs", **compare(expected, observed(converted, case, evaluation))}
        at("count")
        result["int8_share"] = int8_share(model, converted)
    except Exception as error:
        root = _root(error)
        result = {
            "status": "error",
            "stage": stage,
            "error": type(error).__name__,
            "line": _first_line(error),
            "root": "" if root is error else f"{type(root).__name__}: {_first_line(root)}",
            "where": _last_frame(root),
            "message": str(error)[:2000],
        }
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


# ------------------------------------------------------------------------------
# The sweep
# ------------------------------------------------------------------------------


def run_one(name: str, contender: str, timeout: float, threads: int) -> Result:
    """``measure`` in a process of its own, which may hang or crash."""
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--contender", name, contender]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    key = {"model": name, "contender": contender}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {**key, "status": "error", "stage": "any", "error": "Timeout", "line": f"longer than {timeout:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {**key, "status": "error", "stage": "any", "error": f"Exit {done.returncode}", "line": last}
    return {**key, **json.loads(done.stdout.strip().splitlines()[-1])}


def load_results(path: Path | None) -> dict[tuple[str, str], Result]:
    """What an earlier sweep left; a line that was cut off by an interruption is measured again."""
    found = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            result: Result = json.loads(line)
            found[(result["model"], result["contender"])] = result
    return found


def sweep(
    pairs: Sequence[tuple[str, str]], path: Path | None, *, timeout: float, threads: int, jobs: int
) -> dict[tuple[str, str], Result]:
    """Measure every pair that ``path`` doesn't hold yet, with a line of progress for each."""
    results = load_results(path)
    missing = [pair for pair in pairs if pair not in results]
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_one, *pair, timeout, threads): pair for pair in missing}
        for count, future in enumerate(as_completed(futures), 1):
            pair, result = futures[future], future.result()
            results[pair] = result
            if path:
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            seconds = result.get("seconds", timeout)
            print(f"[{count}/{len(missing)}] {pair[0]} {pair[1]}: {cell(result)} ({seconds:g} s)", file=sys.stderr)
    return {pair: results[pair] for pair in pairs}


def cell(result: Result) -> str:
    """A result in a few words."""
    if result["status"] != "runs":
        text = f"{result['stage']}: {result['error']}: {result['line']}".replace("|", "/")
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    found = result["sqnr_db"]
    quality = result.get("note", "not comparable")[:_SHOWN] if found is None else f"{found:.1f} dB"
    return f"runs, {quality}, int8 {result['int8_share']:.0%}"


def summary(results: Sequence[Result]) -> list[str]:
    """Shares over all models, of which those that fail have no int8 weights."""
    runs = [result for result in results if result["status"] == "runs"]
    # Equal outputs (infinite SQNR) because nothing was quantized are no success of quantization.
    plausible = [r for r in runs if r["int8_share"] > 0 and r["sqnr_db"] is not None and r["sqnr_db"] > PLAUSIBLE_DB]
    share = math.fsum(result["int8_share"] for result in runs) / len(results)
    count = len(results)
    return [
        f"{len(runs)}/{count} ({len(runs) / count:.0%})",
        f"{len(plausible)}/{count} ({len(plausible) / count:.0%})",
        f"{share:.0%}",
    ]


def failures(results: Sequence[Result]) -> str:
    """Failures grouped by cause, the most frequent first; what differs between models is left out of the cause."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        if result["status"] == "runs":
            continue
        line = result.get("root") or f"{result['error']}: {result['line']}"
        cause = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "*", line)[:160]
        groups[(result["contender"], f"{result['stage']}: {cause}")].append(result["model"])
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))
    return "\n".join(
        f"- {contender}, {len(names)}x {cause}: {', '.join(names)}" for (contender, cause), names in ordered
    )


def report(results: dict[tuple[str, str], Result], names: Sequence[str], contenders: Sequence[str]) -> str:
    """The table, the summary by family, and the failures by cause."""
    header = ["model", *contenders]
    rows = [[name, *(cell(results[(name, contender)]) for contender in contenders)] for name in names]
    shares = []
    chosen = {CASES[name].family for name in names}
    for group in [*(family for family in FAMILIES if family in chosen), "all"]:
        members = [name for name in names if group in ("all", CASES[name].family)]
        for contender in contenders:
            shares.append([group, contender, *summary([results[(name, contender)] for name in members])])
    parts = [
        markdown_table(header, rows),
        markdown_table(
            ["models", "contender", "run", f"above {PLAUSIBLE_DB:g} dB with int8 weights", "mean int8 share"], shares
        ),
        "Failures by cause:\n\n" + (failures(list(results.values())) or "none"),
        f"torch.ao: engine {TORCH_AO_ENGINE}; {_versions()}{machine_line()}",
    ]
    return "\n\n".join(parts)


def _versions() -> str:
    from importlib.metadata import version

    return "".join(f"{name} {version(name)}; " for name in ("torchvision", "transformers"))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--only", metavar="REGEX", default="", help="models whose name has a match")
    parser.add_argument("--backends", nargs="*", default=["x86_onednn", "reference"])
    parser.add_argument("--no-torch-ao", action="store_true")
    parser.add_argument("--results", type=Path, help="JSON lines; what stands there isn't measured again")
    parser.add_argument(
        "--settle-batch-norms", action="store_true", help="give batch norms the statistics of random batches first"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model and contender")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", help="a Markdown file to write the tables to")
    parser.add_argument("--contender", nargs=2, metavar=("MODEL", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(*options.contender)))
        return 0
    if options.settle_batch_norms:
        os.environ[_SETTLE] = "1"  # For the workers.
    names = [n for n, case in CASES.items() if case.family in options.families and re.search(options.only, n)]
    if not names:
        parser.error("no model has such a name")
    contenders = [*options.backends, *([] if options.no_torch_ao else [TORCH_AO])]
    pairs = [(name, contender) for name in names for contender in contenders]
    results = sweep(pairs, options.results, timeout=options.timeout, threads=options.threads, jobs=options.jobs)
    write(report(results, names, contenders), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
