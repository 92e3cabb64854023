"""A model that ``compile`` made, beside its stock self compiled the same way.

The one idea: a compiler may round otherwise than eager mode does, so stock *compiled* is what the outputs
have to equal, and how far that is from stock in eager mode is the measure for gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from snn_reversible_plugin import convert
from snn_reversible_plugin.compiler.entry import FirstLook, look_of
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.reports.measure import StepCost, count_step, time_step
from snn_reversible_plugin.reports.timing import TimeRatio, in_turns
from snn_reversible_plugin.reports.trial import Step, tensors_in


@dataclass
class CompiledVerification:
    """Stock in eager mode, stock compiled, and compiled with the pass. Made by :func:`verify`.

    Differences are the largest absolute ones from stock compiled; ``compilers_own`` is how far gradients
    of stock compiled are from stock's in eager mode. ``stored`` are bytes that the compiled regions
    store, by what they are: ``codes`` of spikes, or the operation whose result it is. ``time_ratio`` is to
    stock compiled, with its quartiles. Seconds of compilation are those of the first step.
    """

    outputs_equal: bool
    output_difference: float
    gradients_equal: bool
    gradient_difference: float
    compilers_own: float
    eager: StepCost
    stock: StepCost
    compiled: StepCost
    time_ratio: TimeRatio
    stock_compile_seconds: float
    compile_seconds: float
    stored: dict[str, int]
    on_tape: str | None

    @property
    def ok(self) -> bool:
        """Outputs are those of stock compiled, gradients no further from it than twice its own rounding."""
        close = self.gradients_equal or self.gradient_difference <= 2 * self.compilers_own
        return self.outputs_equal and close

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"ok": self.ok}

    def print(self) -> None:
        """Print the verdict as a table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="[green]as stock compiled" if self.ok else "[red]differs from stock compiled")
        for heading in ("", "stock, eager", "stock, compiled", "compiled"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row("largest output difference", "", "", f"{self.output_difference:g}")
        own, ours = f"{self.compilers_own:g}", f"{self.gradient_difference:g}"
        table.add_row("largest gradient difference", "", own, ours)
        costs = (self.eager, self.stock, self.compiled)
        for label in ("held", "peak"):
            table.add_row(label, *(shown(getattr(cost, label)) for cost in costs))
        stock = (f"{cost.seconds:.3f} s" for cost in (self.eager, self.stock))
        table.add_row("time of a training step", *stock, str(self.time_ratio))
        first = (self.stock_compile_seconds, self.compile_seconds)
        table.add_row("first step, with compilation", "", *(f"{seconds:.1f} s" for seconds in first))
        for kind, size in sorted(self.stored.items(), key=lambda item: -item[1]):
            table.add_row(f"stored: {kind}", "", "", shown(size))
        if self.on_tape is not None:
            table.add_row("not compiled", "", "", self.on_tape)
        Console().print(table)


def verify_compiled(step: Step, rounds: int | None = None) -> CompiledVerification:
    """Train a step with each, and compare. The step is of a model that ``compile`` made."""
    from torch._inductor import config

    compiled: Any = step.model
    look: FirstLook = look_of(compiled)
    # What comes from the compiler's caches shows neither what is stored nor how long it takes.
    if look.on_tape is None and not look.backend.packing.regions:
        torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        return _verified(step, compiled, look, rounds)


def _verified(step: Step, compiled: Any, look: FirstLook, rounds: int | None) -> CompiledVerification:
    eagerly = replace(step, model=compiled._orig_mod)
    options = {**look.options, "options": look.backend.patches or None}
    by_ours = _Called(eagerly, compiled)
    with convert.stock(eagerly.model):
        stock_compiled = torch.compile(eagerly.model, **options)  # binds the stock class's call
        by_stock = _Called(eagerly, stock_compiled, is_stock=True)
        eager = _trained(in_eager_mode := _Called(eagerly, eagerly.model, is_stock=True))
        started = time.perf_counter()
        expected = _trained(by_stock)
        stock_seconds = time.perf_counter() - started
    started = time.perf_counter()
    actual = _trained(by_ours)
    seconds = time.perf_counter() - started
    all_three = in_eager_mode, by_stock, by_ours
    counted = [called.measured(count_step) for called in all_three]
    times = in_turns([partial(called.measured, time_step) for called in all_three], rounds)
    costs = [StepCost(*counts, statistics.median(its)) for counts, its in zip(counted, times, strict=True)]
    stored: dict[str, int] = {}
    for region in look.backend.packing.regions:
        for kind, size in region.stored.items():
            stored[kind] = stored.get(kind, 0) + size
    differences = [_difference(a, b) for a, b in zip(expected, actual, strict=True)]
    return CompiledVerification(
        outputs_equal=differences[0] == 0,
        output_difference=differences[0],
        gradients_equal=differences[1] == 0,
        gradient_difference=differences[1],
        compilers_own=_difference(eager[1], expected[1]),
        eager=costs[0],
        stock=costs[1],
        compiled=costs[2],
        time_ratio=TimeRatio.of(times[2], times[1]),
        stock_compile_seconds=stock_seconds,
        compile_seconds=seconds,
        stored=stored,
        on_tape=look.on_tape,
    )


Tensors = list[torch.Tensor | None]
T = TypeVar("T")


@dataclass(frozen=True)
class _Called:
    """A step of a model through what was compiled of it."""

    step: Step
    call: Any
    is_stock: bool = False

    def output(self) -> Any:
        return self.call(*self.step.inputs, **self.step.kwargs)

    def run(self) -> torch.Tensor:
        return self.step.loss_of(self.output())

    def measured(self, measure: Callable[[Callable[[], torch.Tensor]], T]) -> T:
        with self.step.unchanged(), convert.stock(self.step.model) if self.is_stock else nullcontext():
            return measure(self.run)


def _trained(called: _Called) -> tuple[Tensors, Tensors]:
    """Outputs and gradients of one step."""
    step = called.step
    of = [*(p for p in step.model.parameters() if p.requires_grad), *step.leaves()]
    with step.unchanged():
        output = called.output()
        gradients = torch.autograd.grad(step.loss_of(output), of, allow_unused=True)
    outputs: Tensors = [tensor.detach().clone() for tensor in tensors_in(output)]
    return outputs, list(gradients)


def _difference(expected: Tensors, actual: Tensors) -> float:
    largest = 0.0
    for a, b in zip(expected, actual, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is None or b is None or not a.numel() or torch.equal(a, b):
            continue
        largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(float("inf")).max()))
    return largest
