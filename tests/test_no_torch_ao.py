"""The environment that runs without torch.ao really does."""

import importlib
import os

import pytest


@pytest.mark.skipif(not os.environ.get("QCORE_TESTS_BLOCK_TORCH_AO"), reason="only where torch.ao is blocked")
def test_torch_ao_is_gone():
    for name in ("torch.ao.quantization", "torch.quantization", "torch.ao.quantization.quantize_fx"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
