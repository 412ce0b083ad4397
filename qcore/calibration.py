"""calibrate: run data through a prepared model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def calibrate(prepared: nn.Module, batches: Iterable[Any], *, progress: Progress | None = None) -> None:
    """Run every batch through ``prepared`` without gradients.

    Args:
        prepared: what ``prepare_fx`` returned.
        batches: tensors, tuples of positional arguments, or dictionaries of keyword arguments. A data loader that also
            gives targets is not one of them: give ``(inputs for inputs, _ in loader)``.
        progress: wraps the iterable to show progress, such as ``tqdm.tqdm`` or ``rich.progress.track``.
    """
    with torch.no_grad():
        for batch in batches if progress is None else progress(batches):
            if isinstance(batch, dict):
                prepared(**batch)
            elif isinstance(batch, (tuple, list)):
                prepared(*batch)
            else:
                prepared(batch)
