"""Memory that is freed goes back to the system, not into a heap full of holes.

The C library's allocator keeps what training frees, in pieces between tensors that still live, and raises by itself the size
from which it asks the system for each block: on CPU a step's peak can be half as large again as its tensors. With a fixed
size the peak is near that of the tensors; what it costs is in docs/unlearning_cost.md.
"""

from __future__ import annotations

import ctypes
import os
import sys

SMALL, LARGE = 1 << 19, 1 << 22
"""Bytes from which a block is the system's, for small models and for large ones. What stays in the heap is soon used again, which
is faster, and leaves holes of some hundred megabytes: too many beside a small model, few beside the weights of a large one
(docs/unlearning_cost.md has both)."""
_LARGE_MODEL = 1 << 28
"""Bytes of weights from which a model is large."""

_M_MMAP_THRESHOLD = -3


def return_freed_memory(weights: int = 0) -> bool:
    """Have large blocks, from now on, go back to the system as soon as they are freed. `weights`: bytes of the model's.

    For the whole process. A user's own MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is left alone.

    Returns:
        Whether it is so: False where the C library is not glibc, or the user has set it.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if not sys.platform.startswith("linux"):
        return False
    at_least = LARGE if weights >= _LARGE_MODEL else SMALL
    library = ctypes.CDLL(None)
    return hasattr(library, "gnu_get_libc_version") and library.mallopt(_M_MMAP_THRESHOLD, at_least) == 1
