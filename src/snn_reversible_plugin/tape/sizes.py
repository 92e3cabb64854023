"""What a forward makes, in bytes, from one product to the next: all that a choice of products is made from.

The one idea: the backward of a layer has to have some tensors alive at once, whatever happens to the rest,
and can't have more alive than its forward made and their gradients. Both are sums of sizes, known when the
forward is over, on any device and without a look at a value.

Source: this package's own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from snn_reversible_plugin.ops.layouts import is_plain, storage_key
from snn_reversible_plugin.tape.handles import Handle, Kept, storage_once
from snn_reversible_plugin.tape.operators import Kind, Operator
from snn_reversible_plugin.tape.origins import OUTSIDE, look_up
from snn_reversible_plugin.tape.recipes import tensors_among
from snn_reversible_plugin.tape.replayed import Replayed

# NOTE [What is alive in the backward of a layer]
#
# A *layer* is a product (a convolution or matrix product) and what follows up to the next one. In its
# backward are alive, beside what is held:
#
# 1. At least: in the product's, its input (unless that is held), its result's gradient and its input's. In
#    batch norm's: its input, its result's gradient and its input's.
# 2. At most: what the layer's forward made, each with a gradient of the largest's size on its way in and
#    one on its way out; what the layers of other products made that lead to it, which is rebuilt with it
#    and may wait for its own turn; gradients of what was made before the layer and is used after it; and
#    for the product its input, gradients and a kernel's workspace, measured as twice the larger of input
#    and result (oneDNN, 3x3 convolutions). Where a convolution has few pixels, each thread of a CPU takes
#    some sizes of the weights too: four, with AVX2, for 512 channels of 2x2 pixels.
# 3. The gradient of a parameter stands from the layer on that uses it last. In each other layer that uses
#    it, another one is made beside it, and at most their sum. Such layers, a loop's, keep no products:
#    one of a loop over 20 steps that was kept raised the peak by its own size, all bounds in spite.
# 4. What runs without grad mode runs in a function of somebody's own, and what saves nothing through the
#    tape is checkpointed: their backward runs layers again that nobody has seen. There may be any amount,
#    until a backward was measured: what runs in a node is the node's. Parameters and buffers of chains of
#    reversible blocks, which no recorded operation meets, are told (`takes`).
# 5. A black box (neurons/rerun.py) builds stock's graph of itself: it says how much that is.
#
# For example, the second of two layers (3x3 convolution, batch norm, neuron), all tensors of n bytes: at
# least 3 n; at most 5 n in the convolution's backward, and in the rest's 3 n (convolution's and norm's
# results, spikes) + 2 n.

WORKSPACE = 2  # of a product's backward, in sizes of the larger of its input and result
OF_WEIGHTS = 4  # and of a convolution's on a CPU, in sizes of its weights, a thread


class Moment(NamedTuple):
    """Bytes that were alive once in a layer's backward, the layers whose products' results, rebuilt, were
    among them, the layer whose product was just running again, whether somebody was overwriting the
    layer's own result, and would copy a kept one, and bytes that are not there where one of some layers'
    results is kept."""

    alive: int
    standing: frozenset[int] = frozenset()
    rebuilding: int | None = None
    overwriting: bool = False
    early: frozenset[tuple[int, frozenset[int]]] = frozenset()


@dataclass(slots=True)
class Layer:
    """Bytes of one product and what follows up to the next.

    ``result`` is the product's, ``work`` the multiplications it takes, ``least`` and ``most`` what its
    backward has alive at least and at most, beside ``held``: what is held when its forward is over;
    ``rest`` at most before anything of it is rebuilt, with the result standing.
    ``learned`` are the gradients of the parameters that it uses last. ``needed``: whether the backward
    rebuilds the result; ``shared``: and nobody there overwrites it. ``unknown``: its backward may have any
    amount alive. ``forward``, ``backward``: what was alive in all up to the product's end and in the
    backward, where that was measured.
    """

    result: int = 0
    work: int = 0
    least: int = 0
    most: int = 0
    rest: int = 0
    held: int = 0
    learned: int = 0
    needed: bool = False
    shared: bool = False
    unknown: bool = False
    forward: Sequence[Moment] | None = None
    backward: Sequence[Moment] | None = None


@dataclass(slots=True)
class _Life:
    """A tensor's bytes, the layers that made it and that used it last, and its storage: an address comes
    back after a free."""

    bytes: int
    made: int
    used: int
    storage: weakref.ref[Any]


class Sizes:
    """Takes note of the sizes of one forward that runs on a tape.

    Attributes:
        lives: bytes of what it met that lives anyway: parameters, buffers, inputs.
        gradients: bytes of the parameters' gradients that stand already.
    """

    def __init__(self) -> None:
        self._layers = [Layer()]
        self._made = self._largest = 0  # by the layer's operations so far
        self._others: set[int] = set()  # products that lead to something of the layer
        self._layer_of: dict[int, int] = {}  # by a product's serial number
        self._rebuilt: list[int] = []  # bytes of all that a layer's forward made
        self._handles: list[weakref.ref[Replayed] | None] = [None]
        self._lives: dict[int, _Life] = {}  # by storage
        self._ended: list[_Life] = []
        self._parameters: dict[int, tuple[int, list[int]]] = {}  # bytes, and the layers that use it
        self._refs: list[weakref.ref[torch.Tensor]] = []  # to them
        self.lives = self.gradients = 0
        self._outside: set[int] = set()
        self._held: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._relied_on: list[tuple[weakref.ref[Handle], int]] = []  # and in which layer first
        self._last = 0
        self._began = torch.autograd._get_sequence_nr()
        self._packs = 0

    def packed(self, handle: Handle) -> None:
        """Autograd has saved a tensor, by this handle."""
        self._packs += 1
        waiting = [handle]
        while waiting:
            one = waiting.pop()
            if one in self._held:
                continue
            self._held.add(one)
            if not (isinstance(one, Kept) and one.outside):
                self._relied_on.append((weakref.ref(one), len(self._layers) - 1))
            waiting += one.relies_on()

    def meets(self, args: Iterable[Any]) -> None:
        """An operation of another forward, which is of the same step, takes these."""
        for tensor in tensors_among(args):
            if is_plain(tensor) and look_up(tensor) is OUTSIDE:
                self._meets(tensor, 0)

    def stood(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of tensors that earlier forwards have made, and that live anyway."""
        before = self.lives
        for tensor in tensors:
            self.lives += storage_once(tensor, self._outside)
        return self.lives - before

    def gradients_now(self) -> int:
        """Bytes of the parameters' gradients that stand by now."""
        return sum(_gradient(parameter) for ref in self._refs if (parameter := ref()) is not None)

    @property
    def learned(self) -> int:
        """Bytes of the gradients of all parameters that were met."""
        return sum(size for size, _ in self._parameters.values())

    def takes(self, size: float, lives: Iterable[torch.Tensor]) -> None:
        """The backward of something in this layer will have so many bytes alive; ``lives``: what it met
        that lives anyway."""
        for tensor in filter(is_plain, lives):
            self._meets(tensor, len(self._layers) - 1)
        if math.isinf(size):
            self._layers[-1].unknown = True
        else:
            self._made += int(size)

    def computed(self, operator: Operator, args: Iterable[Any], out: Any) -> None:
        """An operation ran."""
        outputs = [one for one in tensors_among((out,)) if is_plain(one)]
        made = sum(one.nbytes for one in outputs)
        if operator.work:
            self._product(operator, args, outputs, made)
        here = len(self._layers) - 1
        layer = self._layers[here]
        for tensor in tensors_among(args):
            if not is_plain(tensor):
                continue
            if look_up(tensor) is OUTSIDE:
                self._meets(tensor, here)
            else:
                self._life(tensor, here - operator.work).used = here
        for tensor in outputs:
            handle = look_up(tensor)
            if isinstance(handle, Replayed):
                self._others.update(handle.products)
        if operator.kind is Kind.VIEW:
            return
        for tensor in outputs:
            self._life(tensor, here)
        self._last = made
        if not operator.work:
            self._made += made
            self._largest = max(self._largest, made)
        if operator.kind is Kind.NORM and any(one.requires_grad for one in tensors_among(args)):
            layer.least = max(layer.least, 3 * made)
            layer.shared = True

    def _product(
        self, operator: Operator, args: Iterable[Any], outputs: list[torch.Tensor], result: int
    ) -> None:
        self._end_layer()
        operands = [one for one in tensors_among(args) if is_plain(one)]
        differentiated = any(one.requires_grad for one in operands)
        layer = Layer(result, multiplications(operator, operands, outputs))
        layer.unknown = not torch.is_grad_enabled() or (differentiated and not self._packs)
        self._packs = 0
        handle = look_up(outputs[0]) if outputs else None
        self._handles.append(weakref.ref(handle) if isinstance(handle, Replayed) else None)
        if isinstance(handle, Replayed):
            for serial in handle.products:
                self._layer_of.setdefault(serial, len(self._layers))
        activations = [one for one in operands if look_up(one) is not OUTSIDE]
        learns = any(look_up(one) is OUTSIDE and one.requires_grad for one in operands)
        inputs = sum(one.nbytes for one in activations)
        rebuilt = sum(one.nbytes for one in activations if not isinstance(look_up(one), Kept))
        gradients = sum(one.nbytes for one in activations if one.requires_grad)
        if differentiated:
            # Where several activations are multiplied, as in attention, a gradient at a time may do.
            one_input = len(activations) == 1
            layer.least = result + (gradients + rebuilt * learns if one_input else 0)
            layer.most = result + inputs + gradients + WORKSPACE * max(inputs, result)
            if "conv" in operator.name and not outputs[0].is_cuda:
                weights = sum(one.nbytes for one in operands) - inputs
                layer.most += OF_WEIGHTS * torch.get_num_threads() * weights
        self._layers.append(layer)

    def _end_layer(self) -> None:
        layer = self._layers[-1]
        here = len(self._layers) - 1
        others = {self._layer_of.get(serial, here) for serial in self._others} - {here}
        largest = max(self._largest, layer.result)
        made = self._made + layer.result + sum(self._rebuilt[at] for at in others)
        layer.most = max(layer.most, made + 2 * largest)
        self._rebuilt.append(self._made + layer.result)
        layer.rest = layer.result + 2 * self._largest
        self._made = self._largest = 0
        self._others = set()

    def _meets(self, tensor: torch.Tensor, here: int) -> None:
        """A layer met something that lives anyway."""
        whole = tensor if tensor._base is None else tensor._base
        if whole.grad_fn is not None and whole.grad_fn._sequence_nr() >= self._began:
            return  # a neuron's own arithmetic, which is not recorded, made it in this forward
        self.lives += storage_once(whole, self._outside)
        if whole.requires_grad and whole.is_leaf:
            self._uses(whole, here)

    def _uses(self, parameter: torch.Tensor, here: int) -> None:
        """A layer uses a parameter."""
        if id(parameter) not in self._parameters:
            self._parameters[id(parameter)] = parameter.nbytes, []
            self._refs.append(weakref.ref(parameter))
            self.gradients += _gradient(parameter)
        _, layers = self._parameters[id(parameter)]
        if not layers or layers[-1] != here:
            layers.append(here)

    def _life(self, tensor: torch.Tensor, made: int) -> _Life:
        """A tensor's life: one that has not been met was made in this layer."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        life = self._lives.get(key)
        if life is None or life.storage() is not storage:
            if life is not None and life.used > life.made + 1:
                self._ended.append(life)
            life = self._lives[key] = _Life(tensor.nbytes, made, made, weakref.ref(storage))
        return life

    def read(self) -> list[Layer]:
        """The layers of the forward, which is over; the last one stands for the loss."""
        self._end_layer()
        layers = [*self._layers, Layer(most=4 * self._last)]
        seen: set[int] = set()
        for relied_on, at in self._relied_on:
            one = relied_on()
            layers[at].held += 0 if one is None else one.stored(seen)
        for before, after in pairwise(layers):
            after.held += before.held
        for life in (*self._ended, *self._lives.values()):
            for layer in layers[life.made + 1 : life.used]:
                layer.most += life.bytes
        for layer, ref in zip(layers, self._handles, strict=False):
            handle = None if ref is None else ref()
            layer.needed = handle is not None and handle.uses > 0
        for size, (*others, last) in self._parameters.values():
            layers[last].learned += size
            for at in others:
                layers[at].least += size
                layers[at].most += 2 * size
                layers[at].needed = layers[last].needed = False
        return layers


def _gradient(parameter: torch.Tensor) -> int:
    """Bytes of a parameter's gradient."""
    gradient = parameter.grad
    return 0 if gradient is None or not is_plain(gradient) else gradient.nbytes


def multiplications(operator: Operator, operands: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """How many a product takes, nearly."""
    if not outputs or len(operands) < 2 or any(one.is_nested for one in operands):
        return 0
    if "conv" in operator.name:
        weight = operands[1]
        return outputs[0].numel() * weight.numel() // max(1, weight.shape[0])
    factors = operands[1:] if "add" in operator.name and len(operands) > 2 else operands
    return outputs[0].numel() * (factors[0].shape[-1] if factors[0].dim() else 1)
