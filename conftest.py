"""Fixtures that several test modules share, and the ban on torch.ao for the environment that runs without it."""

import importlib.abc
import os
import sys

import pytest
import torch

BLOCKED = ("torch.ao.quantization", "torch.quantization")


def is_blocked(name):
    return name in BLOCKED or name.startswith(tuple(f"{blocked}." for blocked in BLOCKED))


class NoTorchAO(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if is_blocked(fullname):
            raise ModuleNotFoundError(f"{fullname} is blocked in this environment", name=fullname)
        return None


if os.environ.get("QCORE_TESTS_BLOCK_TORCH_AO"):
    # Torch imports it by itself, so it is taken away again, as if this torch had never had it.
    assert not any(name.startswith("qcore") for name in sys.modules)
    for name in [name for name in sys.modules if is_blocked(name)]:
        del sys.modules[name]
    del torch.ao.quantization, torch.quantization
    sys.meta_path.insert(0, NoTorchAO())

import qcore  # noqa: E402  # after the ban
from qcore.plugins.manager import backend_names  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[found.name for found in qcore.installed_backends()])
def installed_backend(request):
    """The name of each installed backend that this machine supports and that isn't disabled."""
    if request.param not in backend_names():
        pytest.skip("disabled by QCORE_DISABLE_PLUGINS")
    availability = qcore.get_backend(request.param).availability
    if not availability.ok:
        pytest.skip(availability.reason)
    return request.param
