"""Where preparing, calibrating, converting and running a network spend their time, by the library's own functions.

Each step is profiled by itself (cProfile), after one run of all steps on the same model that isn't counted. A profiled
call costs more than one that isn't, so the shares are what to read, and milliseconds only beside each other::

    python benchmarks/profile_steps.py --network mobilenet_v2 --step convert --backend reference
    python benchmarks/profile_steps.py --blocks 400
"""

import argparse
import cProfile
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qcore
from benchmarks._common import machine_line, markdown_table, write
from benchmarks.scale import Block
from examples.zoo import NETWORKS

STEPS = ("float", "prepare", "calibrate", "convert", "run")


@dataclass(frozen=True)
class Spent:
    """Time of one function.

    Attributes:
        name: module and function.
        calls: how often it was called.
        own: seconds in itself.
        cumulative: seconds in it and in all that it calls.
    """

    name: str
    calls: int
    own: float
    cumulative: float


def subject(network: str | None, blocks: int) -> tuple[nn.Module, torch.Tensor]:
    """The model to profile, and an input for it."""
    if network is None:
        return nn.Sequential(*(Block() for _ in range(blocks))).eval(), torch.randn(1, 4, 8, 8)
    entry = NETWORKS[network]
    return entry.build().eval(), torch.randn(1, 3, entry.input_size, entry.input_size)


def profiled(model: nn.Module, x: torch.Tensor, backend: str, wanted: list[str], rounds: int) -> dict[str, list[Spent]]:
    """What each function took in each of the wanted steps, all rounds together."""
    mapping = qcore.get_default_qconfig_mapping(backend)
    profiles = {step: cProfile.Profile() for step in wanted}

    def step(name: str, function: Callable[[], Any], is_counted: bool) -> Any:
        if name not in profiles or not is_counted:
            return function()
        return profiles[name].runcall(function)

    with torch.no_grad():
        for number in range(rounds + 1):
            counted = number > 0
            step("float", partial(model, x), counted)
            prepared = step("prepare", partial(qcore.prepare_fx, model, mapping, (x,)), counted)
            prepared(x)  # The first call makes the code.
            step("calibrate", partial(prepared, x), counted)
            converted = step("convert", partial(qcore.convert_fx, prepared), counted)
            converted(x)
            step("run", partial(converted, x), counted)
    return {name: _spent(profile) for name, profile in profiles.items()}


def _spent(profile: cProfile.Profile) -> list[Spent]:
    # Not by pstats, which takes built-in functions of one name for one another: all operators of torch.ops.
    return [
        Spent(_name(entry.code), entry.callcount, entry.inlinetime, entry.totaltime) for entry in profile.getstats()
    ]


def _name(code: CodeType | str) -> str:
    """The dotted name of a function, as far as it tells whose it is."""
    if isinstance(code, str):
        return f"built-in.{code}"
    steps = Path(code.co_filename).with_suffix("").parts
    for place in reversed(range(len(steps) - 1)):
        # The last: a package's directory may lie in one of the same name.
        if steps[place] in ("torch", "pluggy") or steps[place].startswith("qcore"):
            return ".".join((*steps[place:], code.co_qualname))
    return f"Python.{code.co_qualname}"


def _owner(name: str) -> str:
    """Whose a function is, for the table of own times."""
    if name.startswith(("torch.fx", "torch.nn")):
        return ".".join(name.split(".")[:2])
    if name.startswith("built-in"):
        return "torch's operators" if "torch" in name or "Tensor" in name else "Python"
    return name.partition(".")[0]


def tables(functions: list[Spent], rounds: int, top: int) -> str:
    """The library's functions by cumulative time, and whose functions the time was spent in."""
    total = sum(function.own for function in functions)

    def row(name: str, calls: str, own: float, cumulative: float) -> list[str]:
        times = [f"{1e3 * seconds / rounds:.1f}" for seconds in (cumulative, own)]
        return [name, calls, *times, f"{cumulative / total:.0%}"]

    ours = [f for f in functions if f.name.startswith("qcore") and not f.name.endswith(">")]
    ours.sort(key=lambda function: -function.cumulative)
    rows = [row(f.name, f"{f.calls / rounds:.0f}", f.own, f.cumulative) for f in ours[:top]]
    by_function = markdown_table(["function", "calls", "with all it calls ms", "itself ms", "share"], rows)
    own: dict[str, float] = {}
    for function in functions:
        own[_owner(function.name)] = own.get(_owner(function.name), 0.0) + function.own
    shares = [
        [owner, f"{1e3 * seconds / rounds:.1f}", f"{seconds / total:.0%}"]
        for owner, seconds in sorted(own.items(), key=lambda item: -item[1])
    ]
    return f"{by_function}\n\n{markdown_table(['whose functions', 'ms', 'share'], shares)}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), help="by default a chain of residual blocks")
    parser.add_argument("--blocks", type=int, default=200, help="length of that chain")
    parser.add_argument("--step", choices=(*STEPS, "all"), default="all")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top", type=int, default=25, help="functions to list for each step")
    parser.add_argument("--output", help="a Markdown file to write the tables to")
    options = parser.parse_args()
    wanted = list(STEPS) if options.step == "all" else [options.step]
    model, x = subject(options.network, options.blocks)
    name = options.network or f"chain of {options.blocks} blocks"
    sections = [
        f"## {step}: {1e3 * sum(f.own for f in functions) / options.rounds:.1f} ms under the profiler\n\n"
        + tables(functions, options.rounds, options.top)
        for step, functions in profiled(model, x, options.backend, wanted, options.rounds).items()
    ]
    head = f"# {name}, backend {options.backend}"
    write("\n\n".join([head, *sections, f"{options.rounds} rounds, means; {machine_line()}"]), options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
