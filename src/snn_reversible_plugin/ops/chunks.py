"""Where the neurons of a layer may be cut into chunks.

The one idea: a chunk should fit the cores' caches, and cutting must not show in a single bit. For
additions and products it never does. For exponentials and their like it depends on how torch shares a
vector out among threads and registers, so the cuts follow that. Source:
``aten/src/ATen/cpu/vec/functional_base.h``, ``aten/src/ATen/native/cpu/Loops.h`` and
``aten/src/ATen/Parallel.h`` in PyTorch; held to them by a test.
"""

from __future__ import annotations

import torch

# NOTE [Where neurons may be cut]
#
# 1. On a CPU, torch works on vector registers and finishes the last few elements of each thread's share
#    one by one. exp, sigmoid, cos and their like are other code there, and can differ in the last bit.
# 2. So wherever such a function is involved, a piece has to end where stock's step ends a thread's
#    share, or at a multiple of the registers' length from that share's beginning.
# 3. Shares are n / k elements, rounded up, for the smallest k of the number of threads and of n / 32,768
#    rounded up. Where they don't end at a multiple, a step is not cut at all.
# 4. The pieces are shared out among threads too: up to one grain each, or evenly in whole grains.
_GRAIN = 32_768
_REGISTERS = 64  # a multiple of any vector loop's step


def chunk_size(device: torch.device) -> int:
    """How many neurons to work on at a time: what the cores' caches hold, or what fills a GPU.

    On a GPU to launch by chunks pays only where a chunk needs much of all steps, or bytes count most.
    """
    if device.type != "cpu":
        return 1 << 20
    threads = torch.get_num_threads()
    return _GRAIN * (2 * threads if threads <= 8 else min(threads, 16))


def cuts(n: int, device: torch.device, uniform: bool) -> list[slice]:
    """How to cut n neurons into chunks such that every element comes out as if they weren't cut.

    ``uniform``: no function is involved whose bits depend on an element's place.
    """
    size = chunk_size(device)
    if not uniform and device.type == "cpu":
        threads = torch.get_num_threads()
        shares = min(threads, -(-n // _GRAIN))
        if shares > 1 and -(-n // shares) % _REGISTERS:
            return [slice(0, n)]
        rest = n - n % size
        ends = [*range(size, rest + 1, size)]
        grains = n % size // _GRAIN
        if grains > threads:
            ends.append(rest + threads * _GRAIN)
        ends += [rest + grains * _GRAIN, n]
    else:
        ends = [*range(size, n, size), n]
    begins = [0, *ends[:-1]]
    return [slice(a, b) for a, b in zip(begins, ends, strict=True) if b > a] or [slice(0, 0)]
