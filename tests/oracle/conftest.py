"""Marks every test in this directory ``oracle``, and lets it hear torch.ao's own warnings without failing."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Test modules are imported without their directory on the path; they share `both_sides.py`.
sys.path.insert(0, str(HERE))


def pytest_configure(config):
    config.addinivalue_line("markers", "oracle: compares with the torch.ao that ships inside torch (development only)")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.oracle)
            # torch.ao warns that it is deprecated, of reduce_range, of its own quantized dtypes, and more.
            for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))
            item.add_marker(pytest.mark.filterwarnings("error::qcore.errors.CalibrationWarning"))
            item.add_marker(pytest.mark.filterwarnings("error::qcore.errors.UnsupportedQConfigWarning"))
