"""Plain text in columns that fits a width."""

import re
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

_GAP = 2
_LEAST = 10


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of a table; what is wider than its column goes on in the next line.

    Args:
        header: of the columns.
        rows: one cell for each column.
        width: of a line, if no column must become narrower than a word.
    """
    widths = _widths([header, *rows])
    surplus = natural_width([header, *rows]) - width
    while surplus > 0 and max(widths) > _LEAST:
        widths[widths.index(max(widths))] -= 1
        surplus -= 1
    lines = _row(header, widths)
    lines.append((" " * _GAP).join("-" * column for column in widths))
    for row in rows:
        lines += _row(row, widths)
    return [line.rstrip() for line in lines]


def natural_width(rows: Sequence[Sequence[str]]) -> int:
    """Of a table in which every cell is one line."""
    widths = _widths(rows)
    return sum(widths) + _GAP * (len(widths) - 1)


def paragraph(text: str, width: int) -> list[str]:
    """Lines of a text, the later ones indented; no word is broken, so that paths can be copied."""
    return textwrap.wrap(text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    columns = [_cell(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return [
        (" " * _GAP).join(part.ljust(width) for part, width in zip(line, widths, strict=True))
        for line in zip_longest(*columns, fillvalue="")
    ]


def _cell(text: str, width: int) -> list[str]:
    """A cell's lines, broken behind a space or a dot, else anywhere."""
    lines = [""]
    for piece in re.findall(r"[^ .]*[ .]?", text):
        if len(lines[-1]) + len(piece.rstrip(" ")) > width and lines[-1].strip():
            lines.append("  ")
        while len(lines[-1]) + len(piece.rstrip(" ")) > width:
            room = width - len(lines[-1])
            lines[-1], piece = lines[-1] + piece[:room], piece[room:]
            lines.append("  ")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
