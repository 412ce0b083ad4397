"""Timing of contenders in turn, each in a process of its own, so that whatever else the machine does hits all alike.

A worker is a command that builds its contender and calls :func:`serve`; :func:`measure` starts the workers and asks
them one after the other, round after round. Rounds are paired: :func:`ratio` compares two contenders round by round.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Seconds between two contenders. Threads of one's pool go on spinning after its work; on two cores, ONNX Runtime's
#: would more than double the time of the next one.
PAUSE = 0.1
#: Calls before the first one that counts; some contenders compile on early calls.
WARM_UP_CALLS = 4


def serve(call: Callable[[], Any], calls: int) -> None:
    """Answer every line on standard input by the median milliseconds of ``calls`` calls.

    One more goes before them: it finds the caches full of another contender's data, and threads of that one's pool
    still spinning.
    """
    for _ in range(WARM_UP_CALLS):
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        taken = []
        call()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e3)
        print(statistics.median(taken), flush=True)


def measure(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round; one that can't be built is named on standard error and left out.

    Args:
        commands: the worker of each contender.
        rounds: how often each is asked.
    """
    workers: dict[str, subprocess.Popen[str]] = {}
    times: dict[str, list[float]] = {}
    try:
        for contender, command in commands.items():
            print(f"  building {contender} ...", file=sys.stderr, flush=True)
            pipe = subprocess.PIPE
            worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            workers[contender] = worker
            line = _line(worker)
            while line and line != "ready":  # What libraries print while they load.
                line = _line(worker)
            if line:
                times[contender] = []
            else:
                print(f"{contender} can't run here: {' '.join(command)}", file=sys.stderr)
        for number in range(rounds):
            print(f"  round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
            for contender, found in times.items():
                worker = workers[contender]
                time.sleep(PAUSE)
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                found.append(float(_line(worker)))
        print(file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return times


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """How many times as long the first takes: the median over paired rounds."""
    return statistics.median(one / other for one, other in zip(first, second, strict=True))


def judged(value: float, bound: float, *, text: str, at_most: bool = True) -> str:
    """A figure with its bound, and whether it meets it."""
    is_met = value <= bound if at_most else value >= bound
    return f"{text} ({'meets' if is_met else 'MISSES'} {bound:g})"


def _line(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()
