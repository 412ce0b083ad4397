"""Memory between the calls of a model."""

import functools

import torch

#: The largest block that moves glibc's thresholds: DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB, less what is put around a block.
_LARGEST_BLOCK = (1 << 25) - (1 << 13)


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what a call frees for the next call, up to 64 MiB; once in a process.

    glibc gives the top of its heap back to the system as soon as more of it than a threshold is free, and every page
    that is asked for again costs a fault: calls that free some ten megabytes took a fifth longer in one process and not
    in another, as their heaps happened to lie. The threshold is twice the largest block that was mapped by itself and
    freed (see M_MMAP_THRESHOLD in mallopt(3)), so it is raised by allocating one, of which no page is touched. Whoever
    has set the thresholds keeps them, and other allocators don't mind.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8)
