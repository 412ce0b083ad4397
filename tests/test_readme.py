"""Every line of code in README.md runs, in the order in which it stands there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

import qcore

PAGE = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?:^(?: {4}.*)?\n)*^ {4}.*\n", PAGE, re.MULTILINE)]
#: The backends that are used, but for the one that the page brings itself.
NAMED = set(re.findall(r'get_default_qconfig_mapping\("(\w+)"\)', PAGE)) - {"mychip"}
SHELL = re.compile(r"\s*(pip|python) ")
PYTHON = [block for block in BLOCKS if not SHELL.match(block)]


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    for name in NAMED:
        installed = {found.name for found in qcore.installed_backends()}
        if name not in installed or not qcore.get_backend(name).availability.ok:
            pytest.skip(f"{name} can't run here")
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 4
    space = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "conv2d + relu" in printed and "fake linear" in printed
    x = space["example"]
    for twin in (space["loaded"], space["whole"]):
        assert torch.equal(twin(x), space["quantized"](x))
    changed = qcore.explain(qcore.prepare_fx(space["model"], space["mapping"], (x,)))
    assert [decision.rule for decision in changed.decisions if decision.weights] == [
        "module_name '', Conv2d number 0", "module_name_regex '3|head.*'",
    ]  # fmt: skip


def test_what_the_page_installs_is_what_it_uses():
    (install,) = (block for block in BLOCKS if block.lstrip().startswith("pip install"))
    (used,) = NAMED
    assert install.split()[2] == f"qcore-{used.replace('_', '-')}"
    assert f"pip install . ./plugins/torch_kernels ./plugins/{used}" in PAGE
    for name in (found.name for found in qcore.installed_backends()):
        assert f"| `{name}`" in PAGE
