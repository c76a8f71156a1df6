"""Giving memory back to the system once something large is gone."""

import ctypes
import gc
import sys


def release_free_memory() -> None:
    """Collect garbage and return what the allocator holds free, where the C library can (glibc).

    It keeps freed blocks for itself otherwise: a model's weights more than the process needs.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
