"""The C library's allocator told to keep what is freed, for the next tensor.

The one idea: glibc gives each large block pages of its own from the system and gives them back when it is
freed, so every large tensor of every step is made of pages that the system has to clear and map first. A
training step asks for the same sizes again and again; what is kept is there at once.

Source: ``mallopt(3)``: a trim threshold of -1 disables trimming, a maximum of 0 the mapping of blocks.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_NEVER, _NONE = -1, 0


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed CPU tensors for the next ones: fewer page faults a step.

    For stock training as much as for converted: it changes no result and no count of bytes that live, but
    how long a large tensor takes to be made. Call it once, before training. The process does not shrink
    again before it ends: other processes don't get back what its largest moment took. Memory of GPUs, which
    torch keeps by itself, is another matter.

    The same, from outside: ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 python script.py``.

    Raises:
        OSError: the C library is not glibc (macOS, Windows, Alpine), or refuses.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> srp.keep_freed_memory()
    """
    try:
        library = ctypes.CDLL(None)
        is_glibc = hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")
    except (OSError, TypeError):  # Windows has no library of the process itself
        is_glibc = False
    if not is_glibc:
        raise OSError(
            "keep_freed_memory sets the allocator of glibc, and this Python runs on another C library: "
            "leave the call out there. Results and peaks are the same without it."
        )
    for name, setting, value in (
        ("M_TRIM_THRESHOLD", _TRIM_THRESHOLD, _NEVER),
        ("M_MMAP_MAX", _MMAP_MAX, _NONE),
    ):
        if library.mallopt(setting, value) != 1:
            raise OSError(
                f"glibc refused mallopt({name}, {value}): set MALLOC_{name[2:]}_ in the environment"
            )
