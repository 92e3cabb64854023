"""What Triton compiles of bit packing, and of every kernel that makes or reads bits.

The one idea: a program works on groups of eight elements, a tile [ROWS, 8], because eight elements of any
number of bits are whole bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# NOTE [Kernels in tiles of eight]
#
# 1. Rows of a tile are groups of eight elements, and a row's bits are whole bytes, so that no two programs
#    share a byte, and bits are made or read where their elements are computed.
# 2. Offsets are int64: a tensor may have more than 2^31 elements.
# 3. Whatever is loaded beyond the end is 0, and nothing is stored there; a byte's bits beyond it are 0.


@triton.jit
def tile(ROWS: tl.constexpr):
    """A program's groups of eight elements [ROWS], and its elements [ROWS, 8]."""
    groups = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return groups, groups[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def store_bits(to, values, groups, n, EACH: tl.constexpr):
    """Write ``values`` [ROWS, 8], int32 of up to EACH (<= 16) bits, to the bytes of their groups.

    ``n``: how many elements there are in all.
    """
    places = tl.arange(0, 8)[None, :] * EACH
    for k in tl.static_range(EACH):
        # Shifts by a word's length or more are undefined; these bits are outside the byte anyway.
        up = tl.minimum(tl.maximum(places - 8 * k, 0), 8)
        down = tl.minimum(tl.maximum(8 * k - places, 0), 31)
        byte = tl.sum(((values << up) >> down) & 255, axis=1)
        at = groups * EACH + k
        tl.store(to + at, byte.to(tl.uint8), mask=(at * 8) // EACH < n)


@triton.jit
def load_bits(bits, index, mask, EACH: tl.constexpr):
    """The elements [ROWS, 8] of what :func:`store_bits` wrote, int32."""
    first = index * EACH
    byte, place = first >> 3, (first & 7).to(tl.int32)
    word = tl.load(bits + byte, mask=mask, other=0).to(tl.int32)
    if 8 % EACH != 0:
        last = (first + EACH - 1) >> 3
        for k in tl.static_range(1, (EACH + 14) // 8):
            more = tl.load(bits + byte + k, mask=mask & (byte + k <= last), other=0).to(tl.int32)
            word = word | (more << (8 * k))
    return (word >> place) & ((1 << EACH) - 1)


@triton.jit
def load_flags(bits, groups, n):
    """Zeros and ones [ROWS, 8] out of a byte a group, int32; a byte is read once."""
    byte = tl.load(bits + groups, mask=groups * 8 < n, other=0).to(tl.int32)
    return (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1


@triton.jit
def pack(x, bits, n, EACH: tl.constexpr, ROWS: tl.constexpr):
    """:func:`.ops.bits.pack_bits`."""
    groups, index = tile(ROWS)
    value = tl.load(x + index, mask=index < n, other=0)
    if EACH == 1:
        store_bits(bits, (value != 0).to(tl.int32), groups, n, EACH)
    else:
        store_bits(bits, value.to(tl.int32), groups, n, EACH)


@triton.jit
def unpack(bits, out, n, EACH: tl.constexpr, ROWS: tl.constexpr):
    """:func:`.ops.bits.unpack_bits`."""
    groups, index = tile(ROWS)
    mask = index < n
    value = load_flags(bits, groups, n) if EACH == 1 else load_bits(bits, index, mask, EACH)
    # Through float32, which holds these: the interpreter knows no way from an integer to bfloat16.
    exact = value.to(tl.float32) if out.dtype.element_ty.is_floating() else value
    tl.store(out + index, exact.to(out.dtype.element_ty), mask=mask)
