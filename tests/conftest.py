"""Fixtures that several test modules share."""

import pytest
import torch

import qcore


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[found.name for found in qcore.installed_backends()])
def installed_backend(request):
    """The name of each installed backend that this machine supports; the reference backend at least."""
    availability = qcore.get_backend(request.param).availability
    if not availability.ok:
        pytest.skip(availability.reason)
    return request.param
