"""What the process does with memory that tensors leave."""

import ctypes

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensors; return whether the C library can.

    By default glibc gives the activations of each step back to the system, which must then fault
    in and clear every page again at the next one. It concerns the whole process and changes no
    number. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; on Windows no such call
        return False
    return all([mallopt(_TRIM_THRESHOLD, -1), mallopt(_MMAP_MAX, 0)])
