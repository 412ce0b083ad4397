"""The whole hook surface: documented, required or not, and called with what a hook asks for."""

import inspect
from pathlib import Path

import pytest

from qcore import errors
from qcore.plugins import hookspecs, reference
from qcore.plugins.answers import ANSWERS
from qcore.plugins.backend import Backend
from qcore.plugins.entry_points import InstalledBackend
from tests.plugins.toys import plugin

HOOKS = [name for name in vars(hookspecs) if name.startswith("qcore_")]


def test_every_hook_is_documented():
    page = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text()
    for name in HOOKS:
        assert f"`{name}" in page
    row = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `qcore_")}
    assert {name for name, line in row.items() if line.endswith("| required |")} == set(hookspecs.REQUIRED)


@pytest.mark.parametrize("name", HOOKS)
def test_just_the_required_hooks_must_be_there(name):
    others = dict.fromkeys(("qcore_fusion_patterns", "qcore_observers", "qcore_lower"), lambda *_: None)
    module = plugin(**{**others, name: None})
    installed = InstalledBackend("toy", "nowhere", "qcore-toy", "0")
    if name in hookspecs.REQUIRED:
        with pytest.raises(errors.PluginError, match=f"doesn't implement {name}"):
            Backend(installed, module)
    else:
        assert Backend(installed, module).info.name == "toy"


def test_no_hook_answers_by_itself():
    """One that a plugin lacks must not be taken for one that gives nothing."""
    assert set(ANSWERS) == set(HOOKS)
    for name in HOOKS:
        hook = getattr(hookspecs, name)
        with pytest.raises(NotImplementedError):
            hook(*[None] * len(inspect.signature(hook).parameters))


def test_the_core_s_own_plugin_is_written_for_this_page():
    assert reference.qcore_backend_info().api_version == hookspecs.PLUGIN_API
    for name in hookspecs.REQUIRED:
        own, spec = (inspect.signature(getattr(module, name)).parameters for module in (reference, hookspecs))
        assert list(own) == list(spec)
