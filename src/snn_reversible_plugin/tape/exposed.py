"""Values that a tape relies on and that somebody outside can still write to, past the version counter.

The one idea: ``mem.data[1] = 0``, ``mem.numpy()[:] = 0`` and a refilled input buffer move no counter. What
a recording that is over relies on is compared with what it was: by a copy where it is small, and then
nothing is lost; by a checksum where it is not, and then the backward says so.

Source: this package's own; ``zlib.crc32``.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable

import torch

from snn_reversible_plugin.ops.layouts import is_dense, storage_key
from snn_reversible_plugin.tape.as_stock import ByReference, ByStorage, Followed
from snn_reversible_plugin.tape.handles import Exposure, Kept
from snn_reversible_plugin.tape.origins import written_unseen

# NOTE [What is looked after]
#
# 1. On a CPU, of the tensors that the tape holds by reference: states and whatever else a call leaves in
#    the user's hands, told by the references to their storage, and what the call was given, parameters
#    apart. Those change between a forward and its backward only by mistake, and are large.
# 2. From the end of a recording to the start of this thread's next one, or to the backward. A membrane of
#    SMALL bytes that a step-by-step loop leaves is copied, compared when the next step begins, and its copy
#    let go: so there is one copy a neuron, whatever the number of steps.
#    The states that a loop inside of a recording leaves are compared by checksums: nobody steps on from
#    there as a rule, and a copy would be all that a neuron of few steps holds.
# 3. An input is looked after until its backward, with a checksum: a copy of each step's would be much.
# 4. A batch norm in training counts in its running statistics at every call, past the version counter, and
#    autograd saves them for a backward that doesn't read them then: they are left alone.
# 5. What was written to is nobody's newest state any more: its entry is void, a timeline ends before it.

Refs = list[weakref.ref[Kept] | weakref.ref[Followed]]
Followers = list[weakref.ref[Followed]]
SMALL = 1 << 16  # bytes

_use_count = getattr(torch._C, "_storage_Use_Count", None)
_local = threading.local()


class Copied(Exposure):
    """By a copy, which is the value from now on where the tensor is not what it was."""

    __slots__ = ("_value",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._value = tensor.clone()

    def is_unchanged(self, tensor: torch.Tensor) -> bool:
        return _stands(tensor) and torch.equal(_bytes(tensor), _bytes(self._value))

    def value(self, kept: Kept) -> torch.Tensor:
        # A copy lies elsewhere, and a kernel may round by alignment.
        tensor = kept.tensor
        same = kept.version == tensor._version and self.is_unchanged(tensor)
        return tensor if same else self._value

    def size(self) -> int:
        return self._value.untyped_storage().nbytes()


class Summed(Exposure):
    """By a checksum: a backward that wants a value that is gone says so."""

    __slots__ = ("_sum",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._sum = _sum_of(tensor)

    def is_unchanged(self, tensor: torch.Tensor) -> bool:
        return _stands(tensor) and _sum_of(tensor) == self._sum

    def value(self, kept: Kept) -> torch.Tensor:
        kept.check_version()
        if not self.is_unchanged(kept.tensor):
            raise kept.was_written()
        return kept.tensor


def leave_alone(kept: Iterable[Kept], statistics: Iterable[torch.Tensor | None]) -> None:
    """A batch norm has counted in these running statistics, and of ``kept`` may be what autograd saved."""
    storages = {storage_key(tensor) for tensor in statistics if tensor is not None}
    for one in kept:
        if storages and storage_key(one.tensor) in storages:
            one.statistic = True
            if one.checksum is not None:
                one.checksum = None


def look_after(by_storage: ByStorage, of_loops: set[int]) -> None:
    """A recording is over, and relies on these; ``of_loops``: the storages of states that loops left."""
    for storage, refs in by_storage.items():
        _look_after(refs, SMALL if storage not in of_loops else 0)


def _look_after(refs: Refs, small: int) -> None:
    kept, others = [], False
    for ref in refs:
        one = ref()
        if not isinstance(one, Kept) or isinstance(one, ByReference):
            continue
        if one.anchored and one.exposure is None:
            kept.append(one)
            others = others or not one.parameter
    if not others or not _can_be_compared(kept[0].tensor):
        return
    is_held = None
    for one in kept:
        tensor = one.tensor
        if one.version != tensor._version or not is_dense(tensor) or one.parameter or one.statistic:
            continue
        size = tensor.numel() * tensor.element_size()
        if one.outside:
            one.exposure = Summed(tensor)
            continue
        if is_held is None:
            is_held = _is_held(kept)
        if is_held:
            one.exposure = Copied(tensor) if size <= small else Summed(tensor)
            _looked_after().append(weakref.ref(one))


def compare_later(state: torch.Tensor, kept: Refs, followed: Followers) -> None:
    """The tape has a copy of its own of a state: whether the user's is still the same, is seen later, and
    told to those who follow it."""
    copies = [one for one in _alive(kept) if not isinstance(one, ByReference)]
    if copies and _can_be_compared(state) and is_dense(state):
        _look_later(state, _As(weakref.ref(copies[-1])), followed)


def sum_later(state: torch.Tensor, followed: Followers) -> None:
    """The tape has a way to a state, and not the state: whether it is still the same, is seen later."""
    if _can_be_compared(state) and is_dense(state):
        _look_later(state, Summed(state).is_unchanged, followed)


def _look_later(
    state: torch.Tensor, is_unchanged: Callable[[torch.Tensor], bool], followed: Followers
) -> None:
    """When the next recording starts, or before that in the backward, by one who follows the state."""
    look = _Look(weakref.ref(state), is_unchanged, followed)
    _looks().append(look)
    for ref in followed:
        if (one := ref()) is not None:
            one.look = look


class _As:
    """Whether a tensor is the same as a copy; with the copy goes who could ask."""

    __slots__ = ("_kept",)

    def __init__(self, kept: weakref.ref[Kept]) -> None:
        self._kept = kept

    def __call__(self, state: torch.Tensor) -> bool:
        kept = self._kept()
        return kept is None or _same_bits(state, kept.tensor)


class _Look:
    """At a state, whether somebody wrote to it; those who follow it are told."""

    __slots__ = ("_followed", "_is_unchanged", "_of_state")

    def __init__(
        self,
        of_state: weakref.ref[torch.Tensor],
        is_unchanged: Callable[[torch.Tensor], bool],
        followed: Followers,
    ) -> None:
        self._of_state, self._is_unchanged, self._followed = of_state, is_unchanged, followed

    def __call__(self) -> None:
        state, told = self._of_state(), [one for ref in self._followed if (one := ref()) is not None]
        if state is not None and not self._is_unchanged(state):
            written_unseen(state)
            for one in told:
                one.spill()
        for one in told:
            one.look = None


def look_again() -> None:
    """A recording starts: what nobody has written to since the last one is as safe as any other value."""
    looks = _looks()
    while looks:
        looks.pop()()
    refs = _looked_after()
    while refs:
        kept = refs.pop()()
        if kept is None or kept.exposure is None:
            continue
        if kept.version == kept.tensor._version and kept.exposure.is_unchanged(kept.tensor):
            kept.exposure = None
        else:
            written_unseen(kept.tensor)


def _alive(refs: Refs) -> list[Kept]:
    return [one for ref in refs if isinstance(one := ref(), Kept) and one.anchored]


def _looks() -> list[_Look]:
    looks: list[_Look] | None = getattr(_local, "looks", None)
    if looks is None:
        looks = _local.looks = []
    return looks


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    with torch._C._DisableTorchDispatch():
        return alike and torch.equal(_bytes(a), _bytes(b))


def _looked_after() -> list[weakref.ref[Kept]]:
    refs: list[weakref.ref[Kept]] | None = getattr(_local, "refs", None)
    if refs is None:
        refs = _local.refs = []
    return refs


def _can_be_compared(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_quantized
    if not plain or tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
        return False
    return _stands(tensor)


def _stands(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its memory: what FSDP2 gathers it lets go of when a layer has run."""
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def _is_held(kept: list[Kept]) -> bool:
    """Whether a storage has references beside the tape's own."""
    if _use_count is None:
        return True
    storage = kept[0].tensor.untyped_storage()
    own = len({id(one.tensor) for one in kept}) + 1
    return _use_count(storage._cdata) > own  # type: ignore[no-any-return]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def _sum_of(tensor: torch.Tensor) -> int:
    """Read where it stands, without numpy, which torch does without, too."""
    with torch._C._DisableTorchDispatch():
        size = tensor.numel() * tensor.element_size()
        return zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr())) if size else 0
