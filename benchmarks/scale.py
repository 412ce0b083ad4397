"""How prepare and convert grow with the model: chains of residual blocks (conv, batch norm, ReLU, conv, add).

Each size is a process of its own. Growth is linear if the milliseconds per block stay the same::

    python benchmarks/scale.py
    python benchmarks/scale.py --blocks 100 400 --torch-ao
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import machine_line, markdown_table, run_json, write

#: torch.ao's time grows with the square of the length: with so many blocks it takes minutes.
TORCH_AO_LIMIT = 400


class Block(nn.Module):
    """A small residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y: Tensor = self.conv2(self.relu(self.norm(self.conv1(x))))
        return y + x


def measure_torch_ao(model: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Seconds of torch.ao's prepare and convert, which make the code at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It announces on every call that it is deprecated.
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        start = time.perf_counter()
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepare = time.perf_counter() - start
        prepared(x)
        start = time.perf_counter()
        convert_fx(prepared)
        return prepare, time.perf_counter() - start, 0.0


def measure_qcore(model: nn.Module, x: Tensor, backend: str) -> tuple[float, float, float]:
    """Seconds of qcore's prepare and convert, and of making the converted model's code, which its first call does."""
    import qcore

    mapping = qcore.get_default_qconfig_mapping(backend)
    start = time.perf_counter()
    prepared = qcore.prepare_fx(model, mapping, (x,))
    prepare = time.perf_counter() - start
    qcore.calibrate(prepared, [x])
    start = time.perf_counter()
    converted = qcore.convert_fx(prepared)
    convert = time.perf_counter() - start
    start = time.perf_counter()
    _ = converted.code
    return prepare, convert, time.perf_counter() - start


def measure(blocks: int, contender: str) -> dict[str, float]:
    """Seconds of the symbolic trace, of prepare and of convert.

    Args:
        blocks: length of the chain.
        contender: ``torch.ao``, or the name of a backend of qcore.
    """
    model = nn.Sequential(*(Block() for _ in range(blocks))).eval()
    x = torch.randn(1, 4, 8, 8)
    torch.fx.symbolic_trace(nn.Sequential(Block()))  # The first trace imports what tracing needs.
    start = time.perf_counter()
    torch.fx.symbolic_trace(model)
    trace = time.perf_counter() - start
    is_torch_ao = contender == "torch.ao"
    prepare, convert, code = measure_torch_ao(model, x) if is_torch_ao else measure_qcore(model, x, contender)
    return {"trace": trace, "prepare": prepare, "convert": convert, "code": code}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[50, 100, 200, 400, 800, 1600])
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--torch-ao", action="store_true", help="torch.ao beside it")
    parser.add_argument("--torch-ao-limit", type=int, default=TORCH_AO_LIMIT, help="up to how many blocks")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--contender", nargs=2, metavar=("BLOCKS", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(int(options.contender[0]), options.contender[1])))
        return 0
    rows = []
    before: tuple[int, float] | None = None
    for blocks in options.blocks:
        ours = run_json("scale.py", "--contender", str(blocks), options.backend)
        both = ours["prepare"] + ours["convert"]
        row = [str(blocks), *(f"{ours[step]:.2f}" for step in ("trace", "prepare", "convert", "code"))]
        growth = "-" if before is None else f"{both / before[1]:.1f}x for {blocks / before[0]:.1f}x"
        row += [f"{1e3 * both / blocks:.1f}", growth, f"{ours['prepare'] / ours['trace']:.1f}"]
        before = blocks, both
        if options.torch_ao:
            found = (
                run_json("scale.py", "--contender", str(blocks), "torch.ao") if blocks <= options.torch_ao_limit else {}
            )
            row += [
                f"{found[step]:.2f} ({found[step] / ours[step]:.0f}x)" if found else "-"
                for step in ("prepare", "convert")
            ]
        rows.append(row)
    header = [
        "blocks",
        "fx trace s",
        "prepare s",
        "convert s",
        "code s",
        "ms per block",
        "growth for blocks",
        "prepare / trace",
    ]
    header += ["torch.ao prepare s", "torch.ao convert s"] if options.torch_ao else []
    note = f"backend {options.backend}, default observers; {machine_line()}"
    write(f"{markdown_table(header, rows)}\n\n{note}", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
