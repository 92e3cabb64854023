"""What a compilation is at, said while it lasts: on a terminal in one line, and to a logger.

The one idea: a region of thousands of operations takes a minute and says nothing, so whoever waits should
see that, and how large it is. Source: ``TORCH_LOGS``, which says it in thousands of lines.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("snn_reversible_plugin.compiler")


def tell(text: str) -> None:
    """Say what begins now. Level INFO of the logger; on a terminal it replaces what was said before."""
    log.info(text)
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


@contextmanager
def compiling(calls: int) -> Iterator[None]:
    """Context manager around the compilation of a region of so many calls.

    Example:
        >>> with compiling(1200):
        ...     pass
    """
    start = time.perf_counter()
    tell(f"srp.compile: a region of {calls:,} operations")
    try:
        yield
    finally:
        log.info("compiled in %.1f s", time.perf_counter() - start)
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
