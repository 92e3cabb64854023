"""Wrapped residual blocks at work: the first block of a chain runs all of it, the others hand on.

The one idea: the module tree stays as it is. The chain of reversible blocks hangs beside it, made of the
blocks' own submodules, and only the blocks' classes are swapped; so parameters, ``state_dict``, optimizers
and references stay valid, and undoing is swapping back.

Source: Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), for the two streams; an entry that duplicates and an
exit that averages as in Gomez et al., "The Reversible Residual Network", NeurIPS 2017.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.blocks.beside import Beside, check_alone, with_beside
from snn_reversible_plugin.blocks.chain import RevSBlock, RevSSequence
from snn_reversible_plugin.blocks.coupling import ADDITIVE, LEAPFROG, Streams
from snn_reversible_plugin.blocks.inner_backward import sharded_modules
from snn_reversible_plugin.modules.swap import WRAPPED_CHAIN, SwappedClass, swap, swapped_class, without

# NOTE [A chain that runs inside its first block]
#
# 1. Whoever calls the blocks, an nn.Sequential or a loop of the user's, calls each once and in order. The
#    first call returns the whole chain's output, so each later block must get that very tensor, and
#    returns it. Another tensor means that something happens between the blocks: an error.
# 2. A caller that leaves early, with a slice of the container say, would take the whole chain's output for
#    a part of it. The backward through an output that not all blocks have seen is an error, and the next
#    pass warns of it.
# 3. The chain holds submodules that it was given once. A submodule that was replaced since would be run in
#    its old form, so the blocks' modules are compared before each run.
# 4. Leapfrog is the same chain with other weights. Its streams, in turn, are a, b = b, a + w f(b); from
#    a = b = x[0], w is 1 for the first branch and 2 for the others: x[1] = x[0] + f(x[0]),
#    x[2] = x[0] + 2 f(x[1]), x[3] = x[1] + 2 f(x[2]), and the last one is the output.


class Branch(nn.Sequential):
    """Modules of one block, in the order in which its residual branch runs them.

    Args:
        modules: the block's own submodules, not copies.
        label: what errors call it.
        tokens: the branch takes ``[T, N, C, L]``, where the stream is ``[T, N, C, H, W]``.

    Attributes:
        weight: how often what the modules compute is added to a stream.
    """

    def __init__(self, modules: Iterable[nn.Module], label: str, tokens: bool = False) -> None:
        super().__init__(*modules)
        self.label, self.tokens, self.weight = label, tokens, 1

    def _get_name(self) -> str:
        return self.label

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.flatten(3)).reshape(x.shape) if self.tokens else super().forward(x)
        return out if self.weight == 1 else self.weight * out


class WrappedChain:
    """Residual blocks that run one after another, and the reversible chain that runs in their place.

    Attributes:
        blocks: the blocks, in order.
        beside: what each of them gives beside its sum.
        chain: the :class:`RevSSequence` of their branches; its ``reversible`` and ``check`` may be set.
        by_conversion: ``convert_to_reversible(blocks=True)`` made it, so ``restore`` undoes it.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        branches: Sequence[Branch],
        beside: Sequence[Beside],
        bits: int = 16,
        states: str = "carry",
        coupling: str = ADDITIVE,
    ) -> None:
        pairs = zip(branches[::2], branches[1::2], strict=True)
        self.blocks, self.by_conversion, self.coupling = tuple(blocks), False, coupling
        self.beside = tuple(beside)
        for branch in branches[1:]:
            branch.weight = 2 if coupling == LEAPFROG else 1
        self.chain = RevSSequence([RevSBlock(f, g, bits=bits) for f, g in pairs], states=states)
        self._modules = self._modules_now()
        self._pass: _Pass | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pass": None}

    def install(self) -> None:
        """Let the blocks run as the chain."""
        for block in self.blocks:
            WRAPPED_CHAIN.set(block, self)
            swap(block, swapped_class(Wrapped, type(block)))

    def remove(self) -> None:
        """Let the blocks run as themselves again."""
        for block in self.blocks:
            WRAPPED_CHAIN.clear(block)
            block.__class__ = without_wrapping(type(block))

    def branches(self) -> list[Branch]:
        """F and G of each pair in turn."""
        return [branch for block in self.chain.blocks for branch in (block.f, block.g)]  # type: ignore[misc]

    def run(self, block: nn.Module, x: Tensor, others: tuple[Any, ...]) -> Any:
        """A block's forward; ``others``: what it is given beside its input."""
        place = next((i for i, member in enumerate(self.blocks) if member is block), None)
        if place is None:
            raise RuntimeError(
                f"{self.label()}: called through a shallow copy of the blocks, as DataParallel makes them. "
                "Use DistributedDataParallel, or copy.deepcopy."
            )
        check_alone(others, self.label())
        return with_beside(self._run_at(place, x), self.beside[place])

    def _run_at(self, place: int, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if place:
            if not compiling:
                self._hand_on(place, x)
            return x
        if compiling:
            return self._output(x)
        self._check_modules()
        self._check_sharding()
        if self._pass is not None and (problem := self._pass.problem()):
            warnings.warn(problem, RuntimeWarning, stacklevel=5)  # or the pass broke off by an exception
        out = self._output(x)
        self._pass = _Pass(self.label(), len(self.blocks), out)
        if out.requires_grad:
            out.register_hook(self._pass.check)
        return out

    def label(self) -> str:
        """The chain's name in errors."""
        branches = self.branches()
        return f"the wrapped blocks from {branches[0].label} to {branches[-1].label}"

    def _output(self, x: Tensor) -> Tensor:
        streams: Streams = self.chain((x, x))
        return streams[1] if self.coupling == LEAPFROG else (streams[0] + streams[1]) / 2

    def _hand_on(self, place: int, x: Tensor) -> None:
        if self._pass is None or self._pass.place != place - 1 or self._pass.output() is not x:
            self._pass = None
            raise RuntimeError(
                f"{self.label()}: block {place} was not called with the output of the block before it, and "
                "wrapped blocks run one after another, each once. Leave them out with skip, or call "
                "unwrap_residual_blocks(model)."
            )
        self._pass.place = place

    def _check_sharding(self) -> None:
        for number, block in enumerate(self.blocks):
            if block in sharded_modules(block):
                raise RuntimeError(
                    f"{self.label()}: fully_shard was called on block {number}, whose parameters exist "
                    "only while that block runs, and the chain runs inside its first block. Shard the "
                    "model, the container of the blocks, or layers inside them instead."
                )

    def _modules_now(self) -> tuple[nn.Module, ...]:
        return tuple(module for block in self.blocks for module in block.modules())

    def _check_modules(self) -> None:
        now = self._modules_now()
        if len(now) != len(self._modules) or any(
            a is not b for a, b in zip(now, self._modules, strict=True)
        ):
            raise RuntimeError(
                f"{self.label()}: a module inside was replaced, added or removed since they were wrapped. "
                "Call unwrap_residual_blocks(model), then wrap_residual_blocks(model) again."
            )


class _Pass:
    """One run of a chain, on its way through the blocks."""

    __slots__ = ("label", "length", "output", "place")

    def __init__(self, label: str, length: int, output: Tensor) -> None:
        self.label, self.length, self.place, self.output = label, length, 0, weakref.ref(output)

    def problem(self) -> str:
        """What is wrong with an output that some block has not seen."""
        if self.place == self.length - 1:
            return ""
        return (
            f"{self.label}: only {self.place + 1} of {self.length} blocks were called, and the first one "
            "returns the output of all. Run them all, or call unwrap_residual_blocks(model)."
        )

    def check(self, _gradient: Tensor) -> None:
        """A hook of the output."""
        if problem := self.problem():
            raise RuntimeError(problem)


class Wrapped(SwappedClass):
    """A residual block of a reversible chain: the first runs the chain, the others hand its output on."""

    is_architecture = True

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        chain = wrapped_chain(self)  # type: ignore[arg-type]
        assert chain is not None
        return chain.run(self, x, (*others, *named.values()))  # type: ignore[arg-type]


def wrapped_chain(module: nn.Module) -> WrappedChain | None:
    """The chain that a block belongs to."""
    return WRAPPED_CHAIN.of(module)


def wrapped_chains(model: nn.Module) -> list[WrappedChain]:
    """The chains of wrapped blocks in a model, in the order of its modules.

    Example:
        >>> from snn_reversible_plugin.blocks.wrapped import wrapped_chains
        >>> from torch import nn
        >>> wrapped_chains(nn.Linear(2, 2))
        []
    """
    found = (wrapped_chain(module) for module in model.modules())
    return list(dict.fromkeys(chain for chain in found if chain is not None))


@contextmanager
def run_plainly(model: nn.Module) -> Iterator[None]:
    """Context manager: the wrapped chains of a model keep what autograd keeps, as its other layers do."""
    chains = [wrapped.chain for wrapped in wrapped_chains(model)]
    before = [chain.reversible for chain in chains]
    for chain in chains:
        chain.reversible = False
    try:
        yield
    finally:
        for chain, reversible in zip(chains, before, strict=True):
            chain.reversible = reversible


def without_wrapping(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a block that runs as itself."""
    return without(cls, lambda mixin: mixin is Wrapped)
