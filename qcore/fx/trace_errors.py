"""What is told of a forward that can't be traced: which module failed, at which line of the user's, and what to do."""

import traceback
from pathlib import Path

import torch
from torch import nn

from qcore.errors import TraceError
from qcore.fx.graph_module import submodule

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def trace_error(error: Exception, path: str, model: nn.Module) -> TraceError:
    """The error of a trace that failed.

    Args:
        error: what failed.
        path: of the module whose forward failed.
        model: what was traced.
    """
    location = _user_location(error)
    where = f"{path!r} ({type(submodule(model, path)).__name__})" if path else f"the model ({type(model).__name__})"
    at = f" at {location}" if location else ""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TraceError(
        f"{type(model).__name__} can't be traced: the forward of {where} failed{at}: "
        f"{reason}. Keep that submodule whole with "
        f"prepare_custom_config=PrepareCustomConfig().set_non_traceable_module_names([{path!r}]), or rewrite the line",
        path,
        location,
        reason,
    )


def _user_location(error: Exception) -> str | None:
    """The innermost line outside torch and qcore."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES) and not frame.filename.startswith("<"):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None
