"""Plain text in columns."""

from collections import OrderedDict

import pytest
from torch import nn

import qcore
from qcore import (
    QConfigMapping,
)
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
