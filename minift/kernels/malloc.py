"""Memory that a step has freed stays with the process, for the next one.

Plain twin: the C library as it is. Taken on a CPU (a GPU's allocator does the same anyway). The C library gives a large
block back to the system as soon as it is freed, and the system hands it out again page by page, each set to zero. A
step frees and takes hundreds of megabytes, so that alone takes from a tenth to two fifths of its time.

    python -m benchmarks ladder          # the rung "malloc": 1.2 x on two Xeon cores, 1.7 x on two of an EPYC
"""

import ctypes

# Numbers of <malloc.h>, for mallopt(3): the GNU C library's, and no other one's.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep what this process frees from now on for what it allocates next.

    Resident memory then stays at its highest for as long as the process lives, and blocks of many sizes leave holes:
    5 to 10 % more of it at the peak.

    Returns:
        False, and nothing is changed, where the C library is not GNU's.
    """
    try:
        library = ctypes.CDLL(None)
    except (TypeError, OSError):  # Windows
        return False
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    no_separate_blocks = library.mallopt(M_MMAP_MAX, 0)
    no_trimming = library.mallopt(M_TRIM_THRESHOLD, -1)
    return bool(no_separate_blocks and no_trimming)
