"""``wrap_residual_blocks``: stock residual networks become reversible ones, with the same parameters.

The one idea: consecutive residual branches are paired as F and G of two full-width streams; the stream
enters both, and their mean leaves. A plan is made first, as data, and is all that a dry run makes.

Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for two streams in
place of one; Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), for spiking branches; Chang et al., "Reversible
Architectures for Arbitrarily Deep Residual Neural Networks", AAAI 2018 (arXiv 1709.03698), for leapfrog.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from snn_reversible_plugin.blocks.beside import Beside
from snn_reversible_plugin.blocks.chain import check_states
from snn_reversible_plugin.blocks.coupling import ADDITIVE, LEAPFROG
from snn_reversible_plugin.blocks.residual import NO_SHORTCUT, Matcher, consecutive_lists, find_branches
from snn_reversible_plugin.blocks.wrapped import (
    Branch,
    WrappedChain,
    without_wrapping,
    wrapped_chain,
    wrapped_chains,
)
from snn_reversible_plugin.grid import check_bits
from snn_reversible_plugin.modules.checks import check_model, skipped_modules
from snn_reversible_plugin.modules.kinds import is_spiking
from snn_reversible_plugin.modules.registry import StaysStock
from snn_reversible_plugin.modules.swap import stock_classes

M = TypeVar("M", bound=nn.Module)

MEANING = {
    ADDITIVE: "A chain computes (y1 + y2) / 2 of two streams that both start as x and take the branches in "
    "turn: not the stock function, and each branch counts half. Fine-tune, or train from the start.",
    LEAPFROG: "A chain computes x[n+1] = x[n-1] + 2 f[n](x[n]), from x[1] = x[0] + f[0](x[0]): not the "
    "stock function, but near it where neighbouring branches are alike. Fine-tune, or train from the "
    "start.",
}


@dataclass(frozen=True)
class BlockReport:
    """One block: its name and type, whether it is ``"wrapped"`` or stays ``"stock"``, and why."""

    name: str
    type: str
    outcome: str
    why: str


@dataclass(frozen=True)
class SurgeryReport:
    """What was done to each residual block, or in a dry run would be. Made by :func:`wrap_residual_blocks`.

    ``chains`` has the pairs (F, G) of each chain, by the names of the blocks that the branches come from.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> from spikingjelly.activation_based import functional, neuron
        >>> from spikingjelly.activation_based.model import sew_resnet
        >>> net = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron.IFNode)
        >>> functional.set_step_mode(net, "m")
        >>> report = srp.wrap_residual_blocks(net, dry_run=True)
        >>> report.dry_run, report.wrapped[:2]
        (True, ('layer1.0', 'layer1.1'))
    """

    blocks: tuple[BlockReport, ...]
    chains: tuple[tuple[tuple[str, str], ...], ...]
    bits: int
    dry_run: bool
    coupling: str = ADDITIVE

    @property
    def meaning(self) -> str:
        """What the chains compute, and what follows."""
        return MEANING[self.coupling]

    @property
    def wrapped(self) -> tuple[str, ...]:
        """Names of the blocks that are, or would be, wrapped."""
        return tuple(block.name for block in self.blocks if block.outcome == "wrapped")

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"meaning": self.meaning}

    def print(self) -> None:
        """Print a table of the blocks, the pairs, and what the change of function means."""
        from rich.console import Console
        from rich.table import Table

        title = "Residual blocks, a plan" if self.dry_run else "Residual blocks"
        table = Table(title=f"{title}: streams on multiples of 2^-{self.bits}")
        for heading in ("block", "type", "", "why"):
            table.add_column(heading, overflow="fold")
        for block in self.blocks:
            color = "green" if block.outcome == "wrapped" else "yellow"
            table.add_row(block.name, block.type, f"[{color}]{block.outcome}", block.why)
        console = Console()
        console.print(table)
        for index, pairs in enumerate(self.chains):
            named = ", ".join(f"({f}, {g})" for f, g in pairs)
            console.print(f"chain {index}: {named}", markup=False)
        console.print(self.meaning if self.chains else "Nothing to wrap.")


def wrap_residual_blocks(
    model: nn.Module,
    *,
    dry_run: bool = False,
    matcher: Matcher | None = None,
    bits: int = 16,
    states: str = "carry",
    skip: Sequence[str | type[nn.Module]] = (),
    consecutive: Sequence[str] = (),
    coupling: str = ADDITIVE,
) -> SurgeryReport:
    """Turn chains of residual blocks into reversible ones, which keep their last output only.

    In place, with the blocks' own submodules: the module tree, the parameters and the keys of
    ``state_dict`` stay as they are, so that ``load_state_dict`` takes weights from the stock network to the
    wrapped one and back. The branches of consecutive shape-preserving blocks become F and G of
    :class:`RevSBlock`, in turn: ``y1 = x1 + snap(F(x2))``, ``y2 = x2 + snap(G(y1))``. Both streams start as
    the chain's input, and its output is their mean. **This is another function than the stock network's**:
    fine-tune it. Gradients are exactly those of the new function.

    Found are SpikingJelly's SEW-ResNet (connect function ADD), MS-, Max- and AttMS-ResNet, SpikingResNet
    (which then fires before the addition, not after it), Spikformer, QKFormer and MaxFormer, multi-step or
    stepped one time step at a time; and blocks of your own, whatever they are called, by the graph of their
    forward: where it is a sum of its one input and a branch, or several such sums one after another, before
    or after a neuron of a known framework, the same in training and in evaluation; also the first of a
    tuple, if nobody uses what is beside it (in a chain it raises). The report says which
    expression was found. Where the graph doesn't show it, a method ``residual_branches()`` of the block, or
    ``matcher``, gives the module b where the block computes ``x + b(x)``, or a list of modules.

    Blocks are consecutive in an ``nn.Sequential``, in the lists of SpikingJelly's models, in an
    ``nn.ModuleList`` that its owner's forward calls one after another, and in the lists named in
    ``consecutive``. An odd block left over stays stock, and so computes what it did. Calling it
    again wraps what is not wrapped yet. A hook that is put on a wrapped block later sees the chain's input
    or output, not the block's; hooks inside the branches fire in the forward and in the rebuild.

    Args:
        model: any ``nn.Module``, converted or not.
        dry_run: only make the plan.
        matcher: a function from a module to its branch or branches, or None where it doesn't know.
        bits: of the grid that the streams live on: their magnitude must stay below 2^(24 - bits).
        states: of the neurons in the chains: ``"carry"`` hands them from call to call, as the frameworks
            do; ``"reset"`` starts them fresh in each call and leaves them so, which frees the final
            membranes, all that a chain holds for each further block: for networks called with whole
            sequences.
        skip: names or types of modules that stay as they are, together with the blocks around them.
        consecutive: names of ``nn.ModuleList`` s whose modules the model's forward calls one after another,
            each with the output of the one before. Calling them otherwise raises a ``RuntimeError``.
        coupling: ``"additive"``, as above; or ``"leapfrog"``: ``x[n+1] = x[n-1] + 2 f[n](x[n])``, with
            ``x[1] = x[0] + f[0](x[0])`` and the last x as output: one stream's form, undone as exactly.
            Magnitudes may grow more in a deep network. It keeps more of a trained network's accuracy where
            nothing is trained afterwards, not even the statistics of batch norms (docs/accuracy.md).

    Raises:
        ValueError: no residual block is known in the model (not in a dry run); a name that is not in it; a
            branch with parameters that are not the block's; ``bits``, ``states`` or a ``coupling`` that
            there are not.
        TypeError: ``model`` is no ``nn.Module``, or is compiled or scripted; a branch is no module.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> from spikingjelly.activation_based import neuron
        >>> from spikingjelly.activation_based.model import sew_resnet
        >>> model = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron.IFNode, step_mode="m")
        >>> report = srp.wrap_residual_blocks(model)
        >>> report.chains
        ((('layer1.0', 'layer1.1'),),)
        >>> report.blocks[2].name, report.blocks[2].why
        ('layer2.0', 'its shortcut is not the identity: it changes the shape')
    """
    check_model(model)
    check_bits(bits)
    check_states(states)
    if coupling not in MEANING:
        raise ValueError(f"coupling must be one of {tuple(MEANING)}, not {coupling!r}")
    with stock_classes(model.modules()):
        plan = _Plan(model, matcher, skip, consecutive)
        runs = list(plan.runs())
        plan.report_the_rest()
        present = wrapped_chains(model)
    named = [tuple((f.label, g.label) for f, g in _pairs(chain.branches())) for chain in present]
    named += [tuple((f.label, g.label) for f, g in _pairs(run.branches)) for run in runs]
    report = SurgeryReport(tuple(plan.in_order()), tuple(named), bits, dry_run, coupling)
    if dry_run:
        return report
    if all(block.why == NO_SHORTCUT for block in report.blocks):
        raise ValueError(
            f"{type(model).__name__} has no residual block that is known, by name or by the graph of its "
            "forward. Give your blocks a method residual_branches, or wrap_residual_blocks a matcher."
        )
    for run in runs:
        WrappedChain(run.blocks, run.branches, run.beside, bits, states, coupling).install()
    return report


def unwrap_residual_blocks(model: M) -> M:
    """Undo :func:`wrap_residual_blocks`, in place: the stock blocks with the parameters as they are now.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> from spikingjelly.activation_based import neuron
        >>> from spikingjelly.activation_based.model import sew_resnet
        >>> model = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron.IFNode, step_mode="m")
        >>> _ = srp.wrap_residual_blocks(model)
        >>> type(srp.unwrap_residual_blocks(model).layer1[0]) is sew_resnet.BasicBlock
        True
    """
    for chain in wrapped_chains(model):
        chain.remove()
    return model


def wrap_by_conversion(model: nn.Module, skip: Sequence[str | type[nn.Module]]) -> SurgeryReport:
    """:func:`wrap_residual_blocks`, to be undone by ``restore``."""
    present = set(map(id, wrapped_chains(model)))
    report = wrap_residual_blocks(model, skip=skip)
    for chain in wrapped_chains(model):
        chain.by_conversion |= id(chain) not in present
    return report


@dataclass
class _Run:
    """Consecutive blocks that become one chain."""

    blocks: list[nn.Module]
    branches: list[Branch]
    beside: list[Beside]


@dataclass
class _Candidate:
    """A block that can be wrapped, if its neighbours can."""

    name: str
    block: nn.Module
    branches: list[Branch]
    remark: str
    beside: Beside


class _Plan:
    """Looks at every block of a model and decides."""

    def __init__(
        self,
        model: nn.Module,
        matcher: Matcher | None,
        skip: Sequence[str | type[nn.Module]],
        consecutive: Sequence[str],
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.matcher = matcher
        self.skipped = set(skipped_modules(model, skip))
        self.under_skipped = {inner for top in self.skipped for inner in top.modules()}
        self.places = Counter(child for module in model.modules() for child in _children(module))
        self.lists = {*consecutive_lists(model), *_named_lists(model, consecutive)}
        self.found: dict[nn.Module, BlockReport] = {}
        self.within_wrapped: set[nn.Module] = set()

    def runs(self) -> Iterator[_Run]:
        """The chains to be made."""
        for container in self.names:
            if container in self.within_wrapped or not self._consecutive(container):
                continue
            row: list[_Candidate] = []
            for block in _children(container):
                candidate = self._candidate(block)
                if candidate is not None and candidate.beside and container not in self.lists:
                    # Who takes a Sequential's tuple, nobody has seen.
                    self._decide(block, "stock", "it gives more than its sum")
                elif candidate is not None:
                    row.append(candidate)
                    continue
                yield from self._paired(row)
                row = []
                if block not in self.found and _composite(block):
                    self._decide(block, "stock", NO_SHORTCUT)
            yield from self._paired(row)

    def report_the_rest(self) -> None:
        """Residual blocks that run in no sequence, inner ones first."""
        for block in reversed(list(self.names)):
            if any(part in self.found for part in block.modules()):
                continue
            if (candidate := self._candidate(block)) is not None:
                why = "it runs in no nn.Sequential: name its nn.ModuleList in consecutive, if it has one"
                self._decide(candidate.block, "stock", why)

    def in_order(self) -> Iterator[BlockReport]:
        """The decisions, in the order of the model's modules."""
        for module in self.names:
            if (decision := self.found.get(module)) is not None:
                inner = (self.found.get(part) for part in module.modules() if part is not module)
                if decision.why != NO_SHORTCUT or not any(inner):
                    yield decision

    def _consecutive(self, module: nn.Module) -> bool:
        plain = type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__
        return plain or module in self.lists

    def _candidate(self, block: nn.Module) -> _Candidate | None:
        if block in self.found or block in self.within_wrapped:
            return None
        name = self.names[block] or "model"
        if wrapped_chain(block) is not None:
            self._decide(block, "wrapped", "already")
            return None
        try:
            found = find_branches(block, name, self.matcher)
            if found is None:
                return None
            if self.places[block] > 1:
                raise StaysStock("it is used at more than one place")
            if block in self.under_skipped or any(inner in self.skipped for inner in block.modules()):
                raise StaysStock("named in skip")
        except StaysStock as refusal:
            if self.names[block]:
                self._decide(block, "stock", str(refusal))
            return None
        return _Candidate(name, block, *found)

    def _paired(self, row: list[_Candidate]) -> Iterator[_Run]:
        """The longest part of a row with an even number of branches, the earlier of equal ones."""
        parts = [(start, stop) for stop in range(len(row), 0, -1) for start in range(stop)]
        even = [(a, b) for a, b in parts if sum(len(c.branches) for c in row[a:b]) % 2 == 0]
        start, stop = max(even, key=lambda part: (part[1] - part[0], -part[0]), default=(0, 0))
        for candidate in row[:start] + row[stop:]:
            why = "left over: branches go in pairs, F and G" if stop else "alone: a pair takes two branches"
            self._decide(candidate.block, "stock", why)
        for candidate in row[start:stop]:
            self._decide(candidate.block, "wrapped", candidate.remark)
        if stop:
            taken = row[start:stop]
            branches = [branch for one in taken for branch in one.branches]
            yield _Run([one.block for one in taken], branches, [one.beside for one in taken])

    def _decide(self, block: nn.Module, outcome: str, why: str) -> None:
        kind = without_wrapping(type(block)).__name__
        self.found[block] = BlockReport(self.names[block] or "model", kind, outcome, why)
        if outcome == "wrapped":
            self.within_wrapped.update(block.modules())


def _children(module: nn.Module) -> list[nn.Module]:
    """Submodules, one that is there twice twice."""
    return [child for child in module._modules.values() if child is not None]


def _composite(module: nn.Module) -> bool:
    """Whether a module runs neurons among others in a forward of its own."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return not isinstance(module, lists) and any(is_spiking(inner) for inner in list(module.modules())[1:])


def _pairs(branches: Sequence[Branch]) -> Iterator[tuple[Branch, Branch]]:
    return zip(branches[::2], branches[1::2], strict=True)


def _named_lists(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(modules.get(name), nn.ModuleList):
            found = f"a {type(modules[name]).__name__}" if name in modules else "no module"
            raise ValueError(f"consecutive takes names of nn.ModuleLists, and {name!r} is {found}")
    return [modules[name] for name in ([names] if isinstance(names, str) else names)]
