"""Plain text in columns."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qcore
from qcore import (
    QConfigMapping,
)
from qcore.table import natural_width, paragraph, table
from tests.fx.planning import OPEN, prepare


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_and_loses_nothing(width):
    deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.LayerNorm(4))
    for name in ("attention_output_of_a_transformer", "encoder_layers", "bert_model"):
        deep = nn.Sequential(OrderedDict([(name, deep)]))
    mapping = QConfigMapping().set_global(OPEN).set_module_name_regex("bert_model[.]encoder_layers[.].*", OPEN)
    plan = qcore.explain(prepare(deep.eval(), mapping, (2, 4)))
    lines = plan.as_text(width).splitlines()
    assert max(map(len, lines)) <= width
    (rule,) = (line for line in lines if set(line) == {"-", " "})
    # What goes on in the next lines of a cell is all there.
    start = lines.index(rule) + 1
    ends = [len(rule[:at].rstrip()) for at in range(1, len(rule)) if rule[at - 1 : at + 1] == " -"]
    cells, before = [], 0
    for end in [*ends, len(rule)]:
        cells.append("".join(line[before:end] for line in lines[start:]).replace(" ", ""))
        before = end
    assert cells[0] == "linear+relu6[readbyanoperator]LayerNorm"
    path = "bert_model.encoder_layers.attention_output_of_a_transformer"
    assert cells[1] == f"{path}.0{path}.2"
    assert cells[3] == "module_name_regex'bert_model[.]encoder_layers[.].*'" * 2
    assert cells[4] == ("referencereferencehasnopatternforit" if width == 200 else "reference(1)")


CELLS = st.text("ab. ", max_size=30).map(lambda text: " ".join(text.split()))


@given(st.lists(st.tuples(CELLS, CELLS), max_size=5), st.integers(5, 70))
def test_no_letter_is_lost_however_narrow_it_is(rows, width):
    lines = table(("one", "two"), rows, width)
    natural = natural_width([("one", "two"), *rows])
    if natural <= width:
        assert len(lines) == len(rows) + 2
    assert max(map(len, lines)) <= max(width, 2 * 10 + 2)  # A column keeps the width of a word.
    letters = "".join(sorted("onetwo" + "".join(cell for row in rows for cell in row)))
    assert "".join(sorted("".join(lines[:1] + lines[2:]))).strip() == letters.replace(" ", "").strip()


def test_columns_stand_below_each_other_and_the_widest_gives_way_first():
    assert table(("a", "bb"), [("xxx", "y")], 80) == ["a    bb", "---  --", "xxx  y"]
    assert table(("a", "b"), [("x", "some words that are long")], 15) == [
        "a  b", "-  ------------", "x  some words", "     that are", "     long",
    ]  # fmt: skip
    assert table(("a",), [("module.of.a_long_path",)], 12) == ["a", "-" * 12, "module.of.", "  a_long_pat", "  h"]


def test_a_paragraph_breaks_no_word():
    text = "note: encoder.layers.0.self_attention.out_proj stays-float as asked"
    lines = paragraph(text, 20)
    assert " ".join(line.strip() for line in lines) == text and "encoder.layers.0.self_attention.out_proj" in lines[1]
    assert all(line.startswith("    ") for line in lines[1:]) and not lines[0].startswith(" ")
