"""A mode that sees every operator which reaches torch in its own thread, and leaves no trace in others.

Torch notes for the whole process whether some thread is in such a mode, for its compiler then lets code be; each mode
puts back what it found. Of two threads whose modes overlap, the last would find the other's and put that back for good.
"""

import threading
from typing import Any, Self

from torch.utils._python_dispatch import TorchDispatchMode

_FOUND = (
    "old_dispatch_mode_flags", "old_non_infra_dispatch_mode_flags",
    "old_without_ignore_compile_internals_dispatch_mode_flags",
)  # fmt: skip
_lock = threading.Lock()
_active: "list[DispatchMode]" = []


class DispatchMode(TorchDispatchMode):
    """Base of qcore's modes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Else torch imports its compiler, which takes seconds.

    def __enter__(self) -> Self:
        with _lock:
            super().__enter__()  # type: ignore[no-untyped-call]
            _active.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        with _lock:
            _active.remove(self)
            for name in _FOUND if _active else ():
                mine, others = getattr(self, name, None), getattr(_active[0], name, None)
                if mine and others:  # What was before the first mode is put back after the last.
                    mine[-1], others[-1] = mine[-1] or others[-1], mine[-1] and others[-1]
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
