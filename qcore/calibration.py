"""calibrate: run data through a prepared model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qcore.errors import CalibrationError, Problems
from qcore.fx.batches import ANY_CONVENTION, InputConvention
from qcore.fx.record import host_of, record_of, records

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Run every batch through ``prepared`` without gradients.

    Args:
        prepared: what ``prepare_fx`` returned.
        batches: tensors, tuples or lists of positional arguments, or mappings of keyword arguments. A data loader that
            also gives targets will do: an entry too much for a forward that takes no more is the target.
        inputs: picks the inputs of each batch, where they can't be told: ``inputs=lambda batch: batch[0]``.
        progress: wraps the iterable to show progress, such as ``tqdm.tqdm`` or ``rich.progress.track``.

    Raises:
        ConfigError: ``prepared`` isn't a prepared model, another argument has a wrong type, or which entries of a batch
            are inputs can't be told.
        CalibrationError: there are no batches.
    """
    convention = _checked(prepared, batches, inputs, progress)
    count = 0
    with torch.no_grad():
        for batch in batches if progress is None else progress(batches):
            args, kwargs = convention.call(batch if inputs is None else inputs(batch))
            prepared(*args, **kwargs)
            count += 1
    if not count:
        raise CalibrationError(
            f"calibrate got no batches: the {type(batches).__name__} is empty, or a generator that was used up"
        )


def _checked(prepared: Any, batches: Any, inputs: Any, progress: Any) -> InputConvention:
    """How ``prepared`` is called, after all arguments were checked."""
    problems = Problems()
    stages = {record.stage for record in records(prepared).values()}
    if "prepared" not in stages:
        found = f"a {stages.pop()} model" if stages else f"{type(prepared).__name__}, which isn't one"
        problems.append(f"prepared: calibrate needs what prepare_fx returned, found {found}")
    is_iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not is_iterable:
        problems.append(
            f"batches: expected an iterable of batches, found {type(batches).__name__}; write [batch] for one batch"
        )
    for name, value in (("inputs", inputs), ("progress", progress)):
        if value is not None and not callable(value):
            problems.append(f"{name}: expected a function, found {type(value).__name__}")
    problems.raise_any()
    record = record_of(host_of(prepared))
    return ANY_CONVENTION if record is None else record.settings.convention
