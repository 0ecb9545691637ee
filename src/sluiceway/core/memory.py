"""Memory that a step frees is kept for the next step, where the C library is glibc."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

#: glibc's numbers of the settings (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Blocks up to so many bytes come from the heap: the most that glibc allows.
FROM_HEAP = 32 << 20
#: So much may be free at the end of the heap before it is given back.
FREE = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GB that it has freed, instead of giving it back at once.

    By default glibc gives freed memory of more than a few MB back to the system, which has to
    clear every page when the next step asks for it again. Nothing is computed differently. It
    holds for the whole process; a user's own `MALLOC_...` or `GLIBC_TUNABLES` stands instead.

    Returns:
        Whether it was set; False where there is no glibc, or the user has set it.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, FROM_HEAP) and mallopt(M_TRIM_THRESHOLD, FREE))
