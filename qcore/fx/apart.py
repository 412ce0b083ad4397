"""A call that compilers leave alone. Imported when one meets a converted model: to import torch's takes seconds."""

from collections.abc import Callable
from typing import Any

import torch

_REASON = (
    "a model that qcore converted runs on its backend's kernels, which can't be compiled. Without fullgraph=True the "
    "rest is compiled around it; to compile or export the whole, take the reference model: "
    "qcore.convert_to_reference_fx(prepared)"
)


@torch.compiler.disable(reason=_REASON)  # type: ignore[untyped-decorator]
def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result, outside of any compiled graph."""
    return function(*args, **kwargs)
