"""Names of torch.ao that aren't here say what to do instead."""

import re
from pathlib import Path

import pytest

import qcore
from qcore.errors import NotSupportedError
from qcore.migration import NOT_HERE

PAGE = (Path(__file__).resolve().parents[1] / "README.md").read_text()


TORCH_AO = """
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, default_qconfig, get_default_qconfig_mapping
from torch.ao.quantization.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig, ObservationType
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torch.ao.quantization.qconfig import QConfig
from torch.ao.quantization.qconfig_mapping import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx
import torch

activation = MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
per_channel = torch.ao.quantization.PerChannelMinMaxObserver
weight = per_channel.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
x = torch.randn(2, 4)
prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(), mapping, (x,))
prepared(x)
converted = convert_fx(prepared)
"""


def test_the_table_of_replacements_migrates_a_program():
    table = PAGE.split("| find | replace by |")[1]
    rows = re.findall(r"^\| `(torch\.ao\S*)`.*\| `(qcore\S*)` \|$", table, re.MULTILINE)
    assert len(rows) == 4
    source = TORCH_AO
    for find, replace in rows:
        source = source.replace(find, replace)
    assert "torch.ao" not in source
    space = {}
    exec(source.replace("import torch\n", "import torch, qcore\n"), space)
    assert qcore.explain(space["converted"]).quantized


@pytest.mark.parametrize("name", [*NOT_HERE, "get_some_backend_config"])
@pytest.mark.parametrize(
    "module",
    ["qcore", "qcore.quantize_fx", "qcore.qconfig", "qcore.qconfig_mapping", "qcore.observer", "qcore.backend_config",
     "qcore.fx.custom_config"],
)  # fmt: skip
def test_importing_what_is_not_here_says_what_to_do_instead(module, name):
    with pytest.raises(NotSupportedError, match=f"{module} has no {name}: .{{20}}"):
        exec(f"from {module} import {name}")


def test_a_name_that_nobody_knows_is_any_module_s_error():
    assert not hasattr(qcore, "nothing_of_the_kind")
    with pytest.raises(ImportError, match="cannot import name 'nothing_of_the_kind' from 'qcore'"):
        exec("from qcore import nothing_of_the_kind")
    assert not set(NOT_HERE) & set(qcore.__all__)
