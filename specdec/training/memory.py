"""What the C library does with memory that a training step gives back."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT = 2**30  # more than the activations of a step that fits two cores
_PADDING = 2**26
_MAPPED_ALONE = 2**25  # the most that glibc accepts


def keep_freed_memory() -> bool:
    """Keep what a step frees for the next one, for the rest of this process; whether the C library could be told.

    glibc returns large blocks to the system and gets them back as pages to be cleared one by one, at every step: about
    3 % of the time of a target alone, 8 % of that of a pair (2 cores, bfloat16, recipe stdlib).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    wanted = ((_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _PADDING), (_MMAP_THRESHOLD, _MAPPED_ALONE))
    accepted = [mallopt(name, value) for name, value in wanted]  # all of them, even where one is refused
    return all(accepted)
