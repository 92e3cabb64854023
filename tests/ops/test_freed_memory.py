"""Freed memory is kept for the next tensor, in a process of its own: the setting is the process's."""

import os
import platform
import subprocess
import sys

import pytest

from snn_reversible_plugin.ops import freed_memory

FAULTS = """
import resource, sys, torch
from snn_reversible_plugin.ops.freed_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(1 << 24)
before = faults()
for _ in range(5):
    torch.ones(1 << 24)
print(faults() - before)
"""


def page_faults(how):
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAULTS, how],
        env=settings, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.slow
def test_a_large_tensor_is_made_of_pages_that_are_there():
    assert page_faults("kept") < 100 < page_faults("stock")


def test_elsewhere_it_says_so(monkeypatch):
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: object())
    with pytest.raises(OSError, match="another C library"):
        freed_memory.keep_freed_memory()
