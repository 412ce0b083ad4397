"""A small model at each of its stages."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcore

STAGES = pytest.mark.parametrize("stage", ["prepared", "reference", "converted"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(features))))


def made(stage: str, backend: str, model: nn.Module | None = None, custom: Any = None) -> nn.Module:
    x = torch.randn(6, 8)
    prepared = qcore.prepare_fx(
        (model or Small()).eval(), qcore.get_default_qconfig_mapping(backend), (x,), custom, backend=backend
    )
    qcore.calibrate(prepared, [(x,)])
    if stage == "prepared":
        return prepared
    return qcore.convert_to_reference_fx(prepared) if stage == "reference" else qcore.convert_fx(prepared)
