"""What a rebuild computes and caches only because a product runs again: none of it, where that is kept.

The one idea: of two values that stand in a backward the one may be there for the other's sake. A step that
keeps the latter has the former only from the moment on at which somebody asks for it.

Source: this package's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.handles import Handle, Watcher, watchers
from snn_reversible_plugin.tape.replayed import Replayed

# NOTE [What is early]
#
# 1. In a rebuild each way from the value that is wanted down to an operand may lead through a product.
#    Kept, the product asks for nothing, and the operand is computed when its own turn comes.
# 2. It is early until then. Who takes it is served, or drops a claim: fewer need it than when the rebuild
#    was over. That is looked at in front of a node and behind it, and what was taken in a node counts as
#    there in all of it.
# 3. In a step that keeps the product it is in that node that it is computed, and with it what it comes
#    from: what of that is early, too, is so no more for the same reasons.
# 4. Results of products are not counted as early: whether they are kept themselves is another question,
#    and where they are not, they run again when their turn comes.
# 5. Two products that only together are on all ways don't make an operand early. What is foreseen may so
#    be too much.
#
# For example: the backward asks for p2(norm(p1(x))), where p are products. That runs p1, the norm, and p2,
# and norm's result, an operand of p2 that its weight's gradient needs, stands from then on. With p2 kept it
# is computed when that gradient's turn has come. x, where it has to be rebuilt and something else needs it
# later, is early for p1 and for p2.


class Early(NamedTuple):
    """Bytes that stand unless one of some layers' results is kept."""

    bytes: int
    layers: frozenset[int]


class _Found(NamedTuple):
    """A value that is early, by its storage's address; None: a product's result, or in others' memory.

    ``needs``: how many need it for as long as nobody takes it.
    """

    address: int | None
    bytes: int
    needs: int


class EarlyValues(Watcher):
    """Those of a backward, while it is measured."""

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[Replayed, int] = weakref.WeakKeyDictionary()
        self._for: weakref.WeakKeyDictionary[Handle, frozenset[int]] = weakref.WeakKeyDictionary()
        self._needs: dict[Handle, int] = {}  # when the rebuilds of this node are over
        self._found: dict[weakref.ref[Replayed], _Found] = {}
        self._new: dict[weakref.ref[Replayed], _Found] = {}  # in this node
        self._looks = False

    def product(self, handle: Replayed, layer: int) -> None:
        """A product's result in the forward."""
        self._layers[handle] = layer

    def watch(self, walk: int) -> None:
        """The backward begins."""
        watchers[walk] = self

    def begin(self) -> dict[int, Early]:
        """A node begins: what is early still, by address."""
        self._looks = True
        return self.now()

    def end(self, made: Set[int]) -> dict[int, Early]:
        """It is over; ``made``: addresses of what it made and has not let go of."""
        self._looks = False
        self._needs.clear()
        for ref, found in self._new.items():  # some are in the memory of others
            self._found[ref] = found if found.address in made else found._replace(address=None)
        self._new.clear()
        return self.now()

    def now(self) -> dict[int, Early]:
        """What is early still, by address."""
        for ref, found in [*self._found.items()]:
            handle = ref()
            if handle is None or handle.cache is None or handle.needs != found.needs:
                del self._found[ref]
                if handle is not None:
                    self._is_taken(handle)
        early = {}
        for ref, found in self._found.items():
            handle = ref()
            layers = frozenset() if handle is None else self._for.get(handle, frozenset())
            if layers and found.address is not None:
                early[found.address] = Early(found.bytes, layers)
        return early

    def ran(self, product: Replayed) -> list[int]:
        """A product has run again: addresses of what had to be computed for it."""
        addresses, waiting, seen = [], [product], {product}
        layer = self._layers[product]
        while waiting:
            for handle in waiting.pop().operands():
                if handle in seen or layer not in self._for.get(handle, ()):
                    continue
                assert isinstance(handle, Replayed)
                seen.add(handle)
                waiting.append(handle)
                value, needs = handle.cache, self._needs.get(handle)
                if value is None or needs is None or handle.inplace or not is_plain(value):
                    continue
                storage = value.untyped_storage()
                address = None if handle in self._layers else storage.data_ptr()
                self._new[weakref.ref(handle)] = _Found(address, storage.nbytes(), needs)
                if address is not None:
                    addresses.append(address)
        return addresses

    def begins(self, order: Sequence[Replayed], uses: Mapping[Handle, int]) -> None:
        if not self._looks:
            return
        found: dict[Handle, frozenset[int]] = {order[-1]: frozenset()}
        for handle in reversed(order):
            layers = self._for[handle] = found[handle]
            self._needs[handle] = handle.needs - uses[handle]
            if handle in self._layers:
                layers |= {self._layers[handle]}
            for operand in handle.operands():
                if operand in uses:
                    found[operand] = found.get(operand, layers) & layers

    def _is_taken(self, handle: Replayed) -> None:
        """Somebody has asked for it, and so for what it is computed from."""
        layers = self._for.pop(handle, frozenset[int]())
        waiting: list[Handle] = [handle]
        while layers and waiting:
            for operand in waiting.pop().relies_on():
                its = self._for.get(operand, frozenset[int]())
                if its & layers:
                    self._for[operand] = its - layers
                    waiting.append(operand)
