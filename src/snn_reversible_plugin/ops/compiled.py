"""How the package compiles loops with numba."""

from __future__ import annotations

from typing import Any

from numba import njit


def compiled(function: Any) -> Any:
    """Compile at the first call, and keep what comes out on disk for the next process."""
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this directory nor the user's can be written to
        return njit(**options)(function)
