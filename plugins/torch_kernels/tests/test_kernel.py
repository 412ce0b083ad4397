"""What kernels of any backend share."""

import re

import pytest
import torch
from qcore_torch_kernels.kernel import with_batch

import qcore
from qcore import errors


def test_a_kernel_that_takes_batches_takes_one_without():
    shapes = []

    def kernel(x):
        shapes.append(tuple(x.shape))
        return x + 1

    x = torch.randn(3, 4, 4)
    assert torch.equal(with_batch(kernel, 4, 3)(x), x + 1)
    assert torch.equal(with_batch(kernel, 4, 3)(x[None]), x[None] + 1)
    assert torch.equal(with_batch(kernel, 2, 4)(x), x + 1)  # A linear layer takes any leading dimensions.
    assert torch.equal(with_batch(kernel, 2, 4)(x[0, 0]), x[0, 0] + 1)
    assert shapes == [(1, 3, 4, 4), (1, 3, 4, 4), (3, 4, 4), (1, 4)]


@pytest.mark.parametrize(
    ("rank", "width", "shape", "wanted"),
    [
        (4, 3, (2, 4, 8, 8), "([batch,] 3, size, size)"),
        (4, 3, (2, 2, 8, 8), "([batch,] 3, size, size)"),
        (4, 3, (8, 8), "([batch,] 3, size, size)"),
        (4, 3, (1, 2, 3, 8, 8), "([batch,] 3, size, size)"),
        (3, 5, (5, 4, 8), "([batch,] 5, size)"),
        (2, 16, (2, 15), "(..., 16)"),
        (2, 16, (), "(..., 16)"),
    ],
)
def test_an_input_of_another_rank_or_width_never_reaches_the_kernel(rank, width, shape, wanted):
    def kernel(x):
        raise AssertionError("was called")

    with pytest.raises(errors.ShapeError, match=re.escape(f"expected a tensor of shape {wanted}")) as caught:
        with_batch(kernel, rank, width)(torch.zeros(shape))
    assert str(caught.value).endswith(f"found {shape}")
    assert isinstance(caught.value, RuntimeError)  # As torch's own for a float model.


@torch.no_grad()
def test_a_replayed_model_still_looks_at_shapes():
    """A recording holds for one shape; another is a call of its own."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    x = torch.randn(2, 16)
    prepared = qcore.prepare_fx(model, qcore.get_default_qconfig_mapping(), (x,))
    qcore.calibrate(prepared, [x])
    converted = qcore.convert_fx(prepared)
    for _ in range(3):
        converted(x)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            converted(x[:, :15])
