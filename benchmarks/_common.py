"""What the benchmarks share: the line about the machine, Markdown tables, child processes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def machine_line() -> str:
    """Instruction sets and versions, on which every figure depends."""
    flags = [name for name, has in torch.cpu.get_capabilities().items() if has is True and "vnni" in str(name)]
    vnni = ", ".join(sorted(str(flag) for flag in flags)) or "no VNNI"
    return f"CPU: {torch.backends.cpu.get_cpu_capability()}, {vnni}; torch {torch.__version__}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source lines up, too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def run_json(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a benchmark script prints on its last line, run in a process of its own.

    Raises:
        RuntimeError: it failed; carries what it wrote to standard error.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise RuntimeError(f"{script} {' '.join(arguments)} failed: {last_line}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def write(text: str, output: str | None) -> None:
    """Print, and keep a copy in a file if one is named."""
    print(text)
    if output:
        Path(output).write_text(text + "\n")
