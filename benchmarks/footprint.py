"""What qcore costs besides time to run: importing it, and the memory of preparing and converting, beside torch.ao.

Importing is timed over ``import torch``, in fresh processes, and mustn't load any plugin. Memory is the peak of what
tensors hold at the same time while a step runs, beyond what they held before it: torch's own record of every allocation
and release on the CPU, from a profiler, in a process for each step. It is given as a multiple of the float model's
parameters and buffers::

    python benchmarks/footprint.py
    python benchmarks/footprint.py --networks mobilenet_v2 --only memory
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, run_json, write
from benchmarks._interleaved import judged
from examples.zoo import NETWORKS

#: Milliseconds of ``import qcore`` over ``import torch``, and the peak of a step in sizes of the float model.
IMPORT_BOUND, MEMORY_BOUND = 50.0, 1.0
STEPS = ("prepare", "convert")

_IMPORT = """
import sys, time, torch
start = time.perf_counter()
import {module}
taken = (time.perf_counter() - start) * 1e3
plugins = sorted(name for name in sys.modules if name.startswith("qcore_"))
print(__import__("json").dumps({{"ms": taken, "plugins": plugins}}))
"""


def import_cost(module: str) -> dict[str, Any]:
    """Milliseconds that a module takes to import after torch in a fresh process, and the plugins that it loads."""
    # With the caches of compiled code that an installed package has.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", _IMPORT.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _torch_ao_steps(model: nn.Module, x: Tensor, engine: str) -> tuple[Callable[[], nn.Module], Callable[[Any], Any]]:
    """The baseline; the one place of this file that may import it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It announces on every call that it is deprecated.
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = engine
    mapping = get_default_qconfig_mapping(engine)
    return lambda: prepare_fx(model, mapping, (x,)), convert_fx


def _qcore_steps(model: nn.Module, x: Tensor, backend: str) -> tuple[Callable[[], nn.Module], Callable[[Any], Any]]:
    mapping = qcore.get_default_qconfig_mapping(backend)
    return lambda: qcore.prepare_fx(model, mapping, (x,)), qcore.convert_fx


def peak_of(step: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that tensors hold at most while a step runs, beyond those before it; those after it; and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    now = peak = 0
    events: Any = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak, now, result


def memory_cost(contender: str, network: str, step: str) -> dict[str, Any]:
    """Peak and remaining growth of a step, in sizes of the float model.

    Args:
        contender: ``qcore:BACKEND`` or ``torch.ao:ENGINE``.
        network: a key of ``examples.zoo.NETWORKS``.
        step: one of ``STEPS``.
    """
    model = NETWORKS[network].build()
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    x = torch.randn(1, 3, NETWORKS[network].input_size, NETWORKS[network].input_size)
    family, _, name = contender.partition(":")
    prepare, convert = (_torch_ao_steps if family == "torch.ao" else _qcore_steps)(model, x, name)
    warnings.simplefilter("ignore")
    if step == "prepare":
        peak, kept, _ = peak_of(prepare)
    else:
        prepared = prepare()
        with torch.no_grad():
            prepared(x)
        peak, kept, _ = peak_of(lambda: convert(prepared))
    return {"peak": peak / size, "kept": kept / size, "megabytes": size / 1e6}


def _import_table(rounds: int) -> str:
    times: dict[str, list[float]] = {"qcore": [], "torch.ao.quantization.quantize_fx": []}
    plugins: set[str] = set()
    for number in range(rounds + 1):
        for module, found in times.items():
            cost = import_cost(module)
            plugins.update(cost["plugins"])
            if number:  # The first fills the caches.
                found.append(cost["ms"])
        print(f"importing, {number} of {rounds} ...", file=sys.stderr, flush=True)
    rows = []
    for module, found in times.items():
        median = statistics.median(found)
        text = f"{median:.1f}"
        if module == "qcore":
            text = judged(median, IMPORT_BOUND, text=text)
        rows.append([module, text, f"{min(found):.1f}"])
    loaded = ", ".join(sorted(plugins)) or "none, as it must be"
    table = markdown_table(["import", "ms after torch, median", "least"], rows)
    return f"{table}\n\n{rounds} fresh processes each, in turn; plugins loaded: {loaded}"


def _memory_table(networks: list[str], contenders: list[str]) -> str:
    rows = []
    for network in networks:
        for contender in contenders:
            cells = []
            for step in STEPS:
                print(f"measuring {network}, {contender}, {step} ...", file=sys.stderr, flush=True)
                found = run_json("footprint.py", "--cell", contender, network, step)
                text = f"{found['peak']:.2f}x"
                if contender.startswith("qcore"):
                    text = judged(found["peak"], MEMORY_BOUND, text=text)
                cells += [text, f"{found['kept']:.2f}x"]
            rows.append([network, f"{found['megabytes']:.1f}", contender, *cells])
    header = ["network", "MB", "contender", "prepare: peak", "kept", "convert: peak", "kept"]
    legend = "peak of what tensors hold beyond what they held before, in sizes of the float model; kept: after the step"
    return f"{markdown_table(header, rows)}\n\n{legend}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet50_augnet"], choices=sorted(NETWORKS))
    parser.add_argument("--backends", nargs="+", default=["x86_onednn", "fbgemm", "qnnpack"], help="of qcore")
    parser.add_argument("--engines", nargs="*", default=["x86"], help="of torch.ao")
    parser.add_argument("--only", choices=["import", "memory"])
    parser.add_argument("--rounds", type=int, default=9, help="imports of each")
    parser.add_argument("--output", help="a Markdown file to write the tables to")
    parser.add_argument("--cell", nargs=3, metavar=("CONTENDER", "NETWORK", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(memory_cost(*options.cell)))
        return 0
    parts = []
    if options.only != "memory":
        parts.append(_import_table(options.rounds))
    if options.only != "import":
        contenders = [f"qcore:{name}" for name in options.backends] + [f"torch.ao:{name}" for name in options.engines]
        parts.append(_memory_table(options.networks, contenders))
    write("\n\n".join([*parts, machine_line()]), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
