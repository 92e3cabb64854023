"""``verify``: a converted model against its stock self, on the user's own batch.

Equality is asked bit for bit, of outputs, gradients and spikes: with stock, or, where neurons run on the
grid, with autograd through the same forward on the grid. In mode "minimal" gradients are sums over slices
of the batch, and equal to rounding. One more step runs in check mode, where each rebuilt tensor is compared
with a checksum that the forward left.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin import convert, tape
from snn_reversible_plugin.compiler.entry import look_of
from snn_reversible_plugin.modules.kinds import is_multi_step, is_spiking, spikes_of
from snn_reversible_plugin.modules.tracking import tracked
from snn_reversible_plugin.ops.layouts import numbers_in
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.reports.compiled import CompiledVerification, verify_compiled
from snn_reversible_plugin.reports.idioms import Idioms
from snn_reversible_plugin.reports.measure import StepCost
from snn_reversible_plugin.reports.memory_report import MOST_CAUSES
from snn_reversible_plugin.reports.timing import TimeRatio
from snn_reversible_plugin.reports.trial import Loss, Step, as_converted, costs, tensors_in
from snn_reversible_plugin.tape.findings import OF_NEURON, FoundBits, KeptInFull
from snn_reversible_plugin.tape.unseen import Unseen, WrittenUnseen

MOST_RUNS = 4  # of stock, until one comes out as the one before it
NEVER_THE_SAME = Unseen(
    "the model",
    f"stock itself gives other results from run to run ({MOST_RUNS} were tried): nothing can be compared",
    "Draw random numbers by torch, use deterministic algorithms, change no attribute in the forward.",
)

ROUNDING = 1e-4  # of a gradient's largest element


@dataclass
class Verification:
    """Stock against converted on one batch. Made by :func:`verify`.

    Differences are the largest absolute ones over all outputs and over all gradients (parameters and
    inputs); ``flipped_spikes`` counts, over all neurons and steps, outputs that differ. ``time_ratio`` is
    how many times stock's time a step takes, with its quartiles. ``replay_error``
    is the message of the check mode, if a rebuilt tensor was not the forward's. ``guarantees`` says of each
    spiking neuron in which arithmetic it runs; ``as_autograd``, where that is not stock's of one, whether
    outputs, gradients and spikes are those of autograd through the same forward, bit for bit; else None.
    ``off_grid`` says why a neuron is off the grid, or left it in this run, ``grid_bits`` how many binary
    digits behind the point one has that is on it. ``unseen`` are the idioms of the model's own that no tape
    can see, with module, operation and remedy; they are no fault by themselves. ``bits`` and ``kept`` are
    those of :func:`memory_report`: the tensors of which a few bits an element are stored, and those that
    are stored in full, the largest first, with the operation that made each, why, and what one may change.
    ``served`` says of a neuron that is set to compute in another way than it does (SpikingJelly's
    ``backend="cupy"``) what it does, and what stock was held to here.
    ``sliced`` is whether gradients are equal to rounding, in mode "minimal", which promises that and no
    more; else None.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = nn.Sequential(layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 2))
        >>> found = srp.verify(srp.convert_to_reversible(model, arithmetic="stock"), torch.rand(4, 8))
        >>> found.ok, found.outputs_equal, found.flipped_spikes, found.guarantees
        (True, True, 0, {'1': 'stock'})
    """

    outputs_equal: bool
    output_difference: float
    gradients_equal: bool
    gradient_difference: float
    flipped_spikes: int
    spikes: int
    replay_error: str | None
    stock: StepCost
    converted: StepCost
    time_ratio: TimeRatio
    stays_stock: dict[str, str] = field(default_factory=dict)
    guarantees: dict[str, str] = field(default_factory=dict)
    as_autograd: bool | None = None
    off_grid: dict[str, str] = field(default_factory=dict)
    grid_bits: dict[str, int] = field(default_factory=dict)
    unseen: list[Unseen] = field(default_factory=list)
    bits: list[FoundBits] = field(default_factory=list)
    kept: list[KeptInFull] = field(default_factory=list)
    sliced: bool | None = None
    served: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """The guarantee holds: bit for bit stock's, or autograd's through the same forward, where that is
        not stock's (on the grid, or fused), but for the rounding of gradients in mode "minimal".

        And every replay was deterministic.
        """
        if self.replay_error is not None or self.sliced is False:
            return False
        if self.as_autograd is not None:
            return self.as_autograd
        gradients = self.gradients_equal or bool(self.sliced)
        return self.outputs_equal and gradients and not self.flipped_spikes

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"ok": self.ok}

    def print(self) -> None:
        """Print the verdict as a table."""
        from rich.console import Console
        from rich.table import Table

        if self.as_autograd is None:
            title = "[green]bit-identical to stock" if self.ok else "[red]differs from stock"
            if self.ok and not self.gradients_equal:
                title = "[green]sliced: stock's outputs, gradients equal to rounding"
        else:
            where = "on the grid" if "grid" in self.guarantees.values() else "fused"
            exact = "exact gradients" if self.ok else "not the gradients"
            title = f"[{'green' if self.ok else 'red'}]{where}: {exact} of the forward that ran"
        table = Table(title=title)
        for heading in ("", "stock", "converted"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row("largest output difference", "", f"{self.output_difference:g}")
        table.add_row("largest gradient difference", "", f"{self.gradient_difference:g}")
        table.add_row("flipped spikes", "", f"{self.flipped_spikes} of {self.spikes}")
        table.add_row("held", shown(self.stock.held), shown(self.converted.held))
        table.add_row("peak", shown(self.stock.peak), shown(self.converted.peak))
        table.add_row("time of a training step", f"{self.stock.seconds:.3f} s", str(self.time_ratio))
        if self.sliced is not None:
            table.add_row(
                "gradients, in slices of the batch", "", "equal to rounding" if self.sliced else "differ"
            )
        for arithmetic in sorted(set(self.guarantees.values())):
            names = [name or "model" for name, kind in self.guarantees.items() if kind == arithmetic]
            table.add_row(f"{arithmetic} arithmetic", "", ", ".join(names))
        for bits in sorted(set(self.grid_bits.values())):
            names = [name or "model" for name, its in self.grid_bits.items() if its == bits]
            table.add_row(f"multiples of 2^-{bits}", "", ", ".join(names))
        for name, reason in self.stays_stock.items():
            table.add_row(f"{name} stays stock", "", reason)
        for name, reason in self.served.items():
            table.add_row(name or "model", "", reason)
        for name, reason in self.off_grid.items():
            table.add_row(f"{name or 'model'} off the grid", "", reason)
        if self.replay_error is not None:
            table.add_row("replay", "", self.replay_error)
        for found in [one for one in self.bits if one.operation != OF_NEURON][:MOST_CAUSES]:
            table.add_row(f"bits in {found.module}", "", str(found))
        for one in [one for one in self.kept if one.matters(self.converted.held)][:MOST_CAUSES]:
            table.add_row(f"kept in full in {one.module}", "", str(one))
        for idiom in self.unseen:
            table.add_row(f"not seen in {idiom.module}", "", f"{idiom.operation}. {idiom.remedy}")
        Console().print(table)


@torch.enable_grad()
def verify(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    repeats: int | None = None,
) -> Verification | CompiledVerification:
    """Run a batch stock and converted, and compare: outputs, gradients, spikes, memory, time.

    The converted step runs once more in check mode, where every rebuilt tensor is compared with a
    checksum that the forward left. The model is left as it was.

    Args:
        model: a converted model; another one is verified as ``convert_to_reversible(model)`` would make
            it. One that :func:`~snn_reversible_plugin.compile` made is compared with stock compiled the
            same way.
        inputs: what the model is called with. Gradients of inputs that require one are compared too.
        kwargs: what it is called with by name.
        loss: from the model's output to a scalar; the mean of squares of all outputs by default.
        repeats: how many times each is timed, in turns; by default three times where a step takes long, and
            up to eleven within two seconds.

    Raises:
        ValueError: no output has a gradient.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = nn.Sequential(layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 2))
        >>> srp.verify(srp.convert_to_reversible(model), torch.rand(4, 8)).ok
        True
    """
    step = Step(model, inputs, kwargs or {}, loss)
    if look_of(model) is not None:
        return verify_compiled(step, repeats)
    with as_converted(model) as settings:
        with _as_served(model), convert.stock(model):
            expected, repeated = _settled(step)
        actual = _run(step)
        as_autograd, expected_gradients = None, expected.gradients
        sliced = settings.mode == "minimal"
        if any(convert.has_arithmetic_of_its_own(module) for module in model.modules()):
            with convert.differentiated(model):
                exact = _run(step)
            expected_gradients = exact.gradients
            if sliced:
                exact = replace(exact, gradients=actual.gradients)
            as_autograd = all(_equal(*parts) for parts in zip(exact.parts(), actual.parts(), strict=True))
        guarantees = {
            name: getattr(module, "arithmetic", "stock")
            for name, module in model.named_modules()
            if is_spiking(module)
        }
        off_grid = {
            name: reason
            for name, module in model.named_modules()
            if is_spiking(module)
            # All time steps in one call: nothing is undone in time, so the grid would be of no use.
            and (settings.arithmetic == "grid" or not is_multi_step(module))
            and (reason := convert.off_grid_reason(name, module, settings))
        }
        served = {
            name: how
            for name, module in model.named_modules()
            if (how := getattr(module, "served_otherwise", ""))
        }
        grid_bits = {
            name: bits
            for name, module in model.named_modules()
            if (bits := convert.grid_bits(module)) is not None
        }
        replay_error, idioms = _checked(step, settings)
        if not repeated:
            idioms.unseen(NEVER_THE_SAME)
        found_bits, kept = idioms.found()
        before, after, time_ratio = costs(step, repeats)
    return Verification(
        outputs_equal=_equal(expected.outputs, actual.outputs),
        output_difference=_difference(expected.outputs, actual.outputs),
        gradients_equal=_equal(expected.gradients, actual.gradients),
        gradient_difference=_difference(expected.gradients, actual.gradients),
        flipped_spikes=sum(
            int((a != b).sum()) for a, b in zip(expected.spikes, actual.spikes, strict=True)
        ),
        spikes=sum(spikes.numel() for spikes in expected.spikes),
        replay_error=replay_error,
        stock=before,
        converted=after,
        time_ratio=time_ratio,
        stays_stock=settings.stays_stock,
        guarantees=guarantees,
        as_autograd=as_autograd,
        off_grid=off_grid,
        grid_bits=grid_bits,
        unseen=idioms.idioms(),
        bits=found_bits,
        kept=kept,
        served=served,
        sliced=_equal_to_rounding(expected_gradients, actual.gradients) if sliced else None,
    )


def _as_served(model: nn.Module) -> ExitStack:
    """Inside, neurons that compute otherwise than they are set do so by their own code, too."""
    with ExitStack() as stack:
        for module in model.modules():
            if as_served := getattr(module, "as_served", None):
                stack.enter_context(as_served())
        return stack.pop_all()


def _checked(step: Step, settings: convert.Settings) -> tuple[str | None, Idioms]:
    """A step in check mode: what was wrong with it, and what was found on the way."""
    idioms = Idioms(step)
    try:
        with step.unchanged(), settings.recording(check=True, observer=idioms) as recorded:
            assert recorded is not None
            with tracked(step.model, recorded), idioms.watching():
                loss = step.run()
            idioms.count()
            loss.backward()
    except WrittenUnseen as error:
        idioms.unseen(error.finding)
        return str(error), idioms
    except RuntimeError as error:
        return str(error), idioms
    return None, idioms


@dataclass
class _Run:
    """What one step computed. Spikes as ``bool``, one tensor a call of a neuron."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    spikes: list[torch.Tensor]

    def parts(self) -> tuple[list[Any], ...]:
        return self.outputs, self.gradients, self.spikes


def _settled(step: Step) -> tuple[_Run, bool]:
    """A run that came out as the one before it, and whether there was one.

    What TorchScript compiles adds up in another order from its second or third call on. Nothing converted
    has run by then, so no fault of a converted run can be in what it is held to.
    """
    run = _run(step)
    for _ in range(MOST_RUNS - 1):
        before, run = run, _run(step)
        if all(_equal(*parts) for parts in zip(before.parts(), run.parts(), strict=True)):
            return run, True
    return run, False


def _run(step: Step) -> _Run:
    spikes: list[torch.Tensor] = []

    def watch(module: nn.Module, _inputs: Any, output: Any) -> None:
        with tape.paused(), torch.no_grad():
            spikes.append(numbers_in(spikes_of(module, output)).ne(0))

    watched = [module for module in step.model.modules() if is_spiking(module)]
    hooks = [module.register_forward_hook(watch) for module in watched]
    try:
        with step.unchanged(reads_gradients=True):
            output = step.forward()
            for hook in hooks:  # what a backward runs again is no call of the network's
                hook.remove()
            step.loss_of(output).backward()
            gradients = [leaf.grad for leaf in (*step.model.parameters(), *step.leaves())]
    finally:
        for hook in hooks:
            hook.remove()
    return _Run([tensor.detach() for tensor in tensors_in(output)], gradients, spikes)


def _equal(expected: list[Any], actual: list[Any]) -> bool:
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and _same(numbers_in(a), numbers_in(b)))
        for a, b in zip(expected, actual, strict=True)
    )


def _equal_to_rounding(expected: list[Any], actual: list[Any]) -> bool:
    """Whether gradients differ by no more than another order of their sums makes them.

    Some are all rounding, as that of a bias in front of a batch norm: what they may differ by follows the
    largest of all.
    """
    sizes = [float(numbers_in(a).abs().max()) for a in expected if a is not None and a.numel()]
    largest = max(sizes, default=0.0)
    for a, b in zip(expected, actual, strict=True):
        if a is None or b is None or not a.numel():
            if (a is None) != (b is None):
                return False
            continue
        rounding = max(ROUNDING, 8 * torch.finfo(a.dtype).eps)
        allowed = rounding * float(numbers_in(a).abs().max()) + rounding / 10 * largest
        if not _difference([a], [b]) <= allowed:
            return False
    return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all numbers are; NaN is NaN, and zero has no sign."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _difference(expected: list[Any], actual: list[Any]) -> float:
    largest = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return float("inf")
        a, b = numbers_in(a), numbers_in(b)
        if a.numel():
            wide = torch.complex128 if a.is_complex() else torch.float64
            off = (a.to(wide) - b.to(wide)).abs()  # of what is infinite in both it is NaN
            largest = max(largest, float(off.nan_to_num(0.0 if _same(a, b) else float("inf")).max()))
    return largest
