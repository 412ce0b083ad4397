"""The dtype that a process makes tensors of by default is the user's: no bit of a float32 model depends on it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcore


class Net(nn.Module):
    """Operators of every kind: with weights, by table, on integers, in float, clamped, padded, hidden in others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 200, 3, padding=1)
        self.depthwise = nn.Conv2d(200, 200, 3, padding=1, groups=200)
        self.scale = nn.Conv2d(200, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(F.relu6(self.first(x))))
        x = self.norm(self.scale(x)).clamp(-0.7, 0.9)
        x = F.pad(self.up(x), (1, 0, 0, 1)) * 0.5
        x = x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)) + F.elu(x)
        rows = F.interpolate(x, size=(2, 2), mode="bilinear").flatten(2).transpose(1, 2)
        mask = torch.zeros(4, 4, dtype=torch.bool).fill_diagonal_(True)
        rows = rows + self.attention(rows, rows, rows, attn_mask=mask)[0]
        return F.hardsigmoid(self.last(rows.mean(1)))


@pytest.fixture
def _default_dtype_is_put_back() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def outputs(backend: str, mapping: qcore.QConfigMapping, dtype: torch.dtype) -> list[Tensor]:
    """What the prepared, the reference and the converted model give, under a default dtype."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(3, 4, 6, 6)
    torch.set_default_dtype(dtype)
    prepared = qcore.prepare_fx(model, mapping, (x,), backend=backend, on_unsupported="ignore")
    with torch.no_grad():
        found = [prepared(x), qcore.convert_to_reference_fx(prepared)(x)]
        converted = qcore.convert_fx(prepared)
        return [*found, *(converted(x) for _ in range(4)), converted(x[:2]), converted(x[:0])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_default_dtype_is_put_back")
def test_results_do_not_depend_on_the_default_dtype(installed_backend: str, dtype: torch.dtype):
    whole = qcore.QConfig(
        qcore.MinMaxObserver, qcore.MinMaxObserver.with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
    )
    dynamic = qcore.QConfigMapping().set_object_type(nn.Linear, qcore.default_dynamic_qconfig)
    mappings = [qcore.get_default_qconfig_mapping(installed_backend), qcore.QConfigMapping().set_global(whole), dynamic]
    for mapping in mappings:
        expected = outputs(installed_backend, mapping, torch.float32)
        found = outputs(installed_backend, mapping, dtype)
        assert [y.dtype for y in found] == [torch.float32] * len(found)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_a_backend_loads_under_any_default_dtype(installed_backend: str, dtype: str):
    # What a plugin makes when it is imported or first asks its kernels takes a fresh process.
    script = f"""
import torch; torch.set_default_dtype(torch.{dtype})
import qcore
backend = {installed_backend!r}
model = torch.nn.Sequential(torch.nn.Linear(20, 20, dtype=torch.float32), torch.nn.GELU()).eval()
x = torch.ones(3, 20, dtype=torch.float32)
prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(backend), (x,), backend=backend)
prepared(x)
print(qcore.convert_fx(prepared)(x).dtype)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.stdout, done.returncode) == ("torch.float32\n", 0), done.stderr
