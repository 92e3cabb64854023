"""One GPU, under eight minutes: kernels held to their references, times and memory of training steps.

    python benchmarks/gpu.py [--small] [--minutes 7.5] [--out out/gpu.json] [--wheels FOLDER]

Needs torch and Triton, and no network. Where SpikingJelly and snnTorch are not installed, ``--wheels``
names a folder with their wheels and those of what they import (``pip download spikingjelly snntorch -d
FOLDER``). One case of each family of kernels comes first, then the training steps, and with the time that
is left, a fifth of it at least, all other cases; the table says how many were checked and how many were
not. Each row is printed and stored when it is done, so that a run that is cut short has what it had; the
tables come last. It exits with 1 where anything differs, or a case raises or takes too long. Without a
GPU, ``--small`` runs all of it on the CPU at small shapes: that shows that it runs, and its figures mean
nothing. Its minutes are the process's own there, whatever else the CPU does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.gpu_checks import Case

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("torch-", "triton-", "nvidia_", "torchvision-", "torchaudio-")


def carry(folder: Path) -> None:
    """Make the packages of wheels importable, whatever else is installed."""
    place = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in sorted(folder.glob("*.whl")):
        if not wheel.name.startswith(LEFT_OUT):
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(place)
    sys.path.append(str(place))


LONGEST = 60  # seconds for a case
SHARE_OF_CHECKS = 0.2  # of the time, kept for what is checked last


class OutOfTime(Exception):
    """A row took longer than it may."""


class NoTimeLeft(OutOfTime):
    """The whole run did."""


class Run:
    """Rows, printed and stored one by one, within the time that there is.

    Args:
        out: where the JSON goes.
        minutes: after which nothing new begins, and what runs is stopped.
        small: shapes that a CPU takes.
    """

    def __init__(self, out: Path, minutes: float, small: bool) -> None:
        self.out, self.small = out, small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_host = self.device.type == "cpu"
        self.clock = time.process_time if on_host else time.monotonic
        timers = (signal.ITIMER_PROF, signal.SIGPROF), (signal.ITIMER_REAL, signal.SIGALRM)
        self.timer, self.alarm = timers[0 if on_host else 1]
        self.end = self.clock() + 60 * minutes
        self.reserved = 60 * minutes * SHARE_OF_CHECKS
        self.forms: dict[str, str] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []

    def check(self, case: Case) -> None:
        """Whether something is equal to its reference. What the run's end cuts short is not checked."""
        found = self.checks[case.family]
        start, wrong = self.clock(), ""
        try:
            with self.at_most(LONGEST):
                wrong = "" if case.holds() else "DIFFERENT"
        except NoTimeLeft:
            return
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        found["checked"] += 1
        if wrong:
            found["wrong"][case.name] = wrong
        print(f"{case.family}: {case.name}: {wrong or 'equal'} ({self.clock() - start:.1f} s)", flush=True)
        self.save()

    def failures(self) -> list[str]:
        """What is not equal to what it has to be, or was not looked at at all."""
        found = [family for family, of in self.checks.items() if of["wrong"] or not of["checked"]]
        return found + [f"{row['work']}, {row['method']}" for row in self.rows if row.get("equal") is False]

    def row(self, work: str, method: str, seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row; whatever goes wrong is its result."""
        row: dict[str, Any] = {"work": work, "method": method}
        start = self.clock()
        try:
            with self.at_most(seconds):
                row |= measure()
        except Exception as error:
            row["why_not"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        row["took"] = round(self.clock() - start, 1)
        self.rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        of_run = self.end - self.reserved - self.clock()
        left = min(seconds, of_run)
        if left < 1:
            raise NoTimeLeft("no time left")

        def stop(*_: Any) -> None:
            raise (OutOfTime if left == seconds else NoTimeLeft)(f"took more than {left:.0f} s")

        before = signal.signal(self.alarm, stop)
        signal.setitimer(self.timer, left)
        try:
            yield
        finally:
            signal.setitimer(self.timer, 0)
            signal.signal(self.alarm, before)

    def save(self) -> None:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU: figures mean nothing"
        about = {"device": name, "torch": torch.__version__, "small": self.small}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        about |= {"forms": self.forms, "checks": self.checks, "rows": self.rows}
        self.out.write_text(json.dumps(about, indent=1))

    def tables(self) -> str:
        """All of it, as Markdown."""
        lines = ["", "| held to its reference | cases checked | not checked | |", "|---|---|---|---|"]
        for family, of in self.checks.items():
            wrong = "; ".join(f"{name}: {what}" for name, what in of["wrong"].items())
            found = wrong or ("equal" if of["checked"] else "not checked")
            lines.append(f"| {family} | {of['checked']} | {of['cases'] - of['checked']} | {found} |")
        lines += ["", "| operation | computed by |", "|---|---|"]
        lines += [f"| {operation} | {form} |" for operation, form in self.forms.items()]
        names = ("held_mib", "peak_mib", "ms", "to_stock", "note")
        lines += ["", f"| work | method | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
        for row in self.rows:
            cells = [str(row.get(name, "")) for name in names[:-1]]
            note = row.get("why_not") or row.get("note", "")
            lines.append(f"| {row['work']} | {row['method']} | {' | '.join(cells)} | {note} |")
        return "\n".join(lines)


# -- every kernel ------------------------------------------------------------------------------------------


def first_of_each(families: dict[str, list[Case]]) -> list[Case]:
    """A case a family."""
    return [cases[0] for cases in families.values()]


def others(families: dict[str, list[Case]]) -> list[Case]:
    """All but those, in turns, so that whenever the time is over each family has had its share."""
    turns = itertools.zip_longest(*(cases[1:] for cases in families.values()))
    return [case for turn in turns for case in turn if case is not None]


# -- training steps ----------------------------------------------------------------------------------------


def measured(run: Run, training: Any, x: torch.Tensor) -> dict[str, Any]:
    """Memory of one step, and the median time of several."""
    from benchmarks.measure import Result, _now, count

    training.run(x)
    result = Result("", "")
    count(training, x, result)
    times: list[float] = []
    while len(times) < (2 if run.small else 10):
        training.model.zero_grad()
        start = _now(x.device)
        training.run(x)
        times.append(_now(x.device) - start)
    found: dict[str, Any] = {"ms": round(1e3 * statistics.median(times), 2)}
    for name, size in (("held_mib", result.held), ("peak_mib", result.peak)):
        if size is not None:
            found[name] = round(size / 2**20, 3)
    return found


def works(run: Run) -> list[tuple[str, str, tuple[int, ...], torch.dtype | None]]:
    """Name of the row, workload, shape, and what autocast computes in; the most wanted first."""
    sew, vgg, spikformer = (4, 112, 3, 224, 224), (8, 64, 2, 32, 32), (4, 64, 3, 32, 32)
    short, long = (100, 128, 512), (1000, 128, 512)
    if run.small:
        sew, vgg, spikformer, short, long = (
            (2, 1, 3, 32, 32), (2, 2, 2, 32, 32), (2, 1, 3, 32, 32), (3, 4, 512), (6, 4, 512)
        )  # fmt: skip
    return [
        ("SEW-ResNet18 bf16", "sew-resnet18", sew, torch.bfloat16),
        ("SEW-ResNet18 fp32", "sew-resnet18", sew, None),
        ("snnTorch loop", "leaky-loop", short, None),
        ("SpikingJelly loop", "lif-loop", short, None),
        ("VGG fp32", "vgg", vgg, None),
        ("VGG bf16", "vgg", vgg, torch.bfloat16),
        ("Spikformer fp32", "spikformer", spikformer, None),
        ("snnTorch loop, long", "leaky-loop", long, None),
    ]


FIRST = ("stock", "memory", "speed")
# What searches or compiles takes long, and comes with the time that is left.
LATER = ("memopt 1", "memopt 2", "compiled", "memopt 3", "memopt 4")
LOOPS = ("leaky-loop", "lif-loop")
CONVERTED: dict[str, dict[str, Any]] = {"default": {}, "fused": {"arithmetic": "fused"}}


def train(run: Run) -> None:
    import snn_reversible_plugin as srp
    from benchmarks.gpu_graphs import graphs, synchronized
    from benchmarks.methods import Training, prepare
    from benchmarks.workloads import WORKLOADS

    stocks: dict[str, float] = {}

    def measure(work: str, workload: Any, method: str, x: torch.Tensor) -> dict[str, Any]:
        torch.manual_seed(0)
        model = workload.make().to(run.device)
        if method == "compiled":
            # All but the code generation, which takes a CPU minutes.
            compile_ = partial(torch.compile, backend="aot_eager" if run.small else "inductor")
            if workload.name == "lif-loop":
                # Its forward resets: dynamo would find the root twice, once in the cache of SpikingJelly's
                # reset_net, and raise "already tracked for mutation". So the loop alone is compiled.
                model.steps = compile_(model.steps)
                compiled = model
            else:
                compiled = compile_(model)
            training = Training(model, lambda x: workload.loss_of(compiled, x))
        elif method in CONVERTED:
            srp.convert_to_reversible(model, **CONVERTED[method])
            training = Training(model, lambda x: workload.loss_of(model, x))
        else:
            training = prepare(method, workload, model, x)
        found = measured(run, training, x)
        stocks.setdefault(work, found["ms"])
        return found | {"to_stock": round(found["ms"] / stocks[work], 3)}

    for methods, seconds in ((FIRST, 30), (LATER, 75)):
        for work, name, shape, dtype in works(run):
            plain = WORKLOADS[name]

            def loss_of(
                model: Any, x: torch.Tensor, plain: Any = plain, dtype: Any = dtype
            ) -> torch.Tensor:
                enabled = dtype is not None
                with torch.autocast(run.device.type, dtype=dtype or torch.bfloat16, enabled=enabled):
                    return plain.loss_of(model, x)

            workload = dataclasses.replace(plain, loss_of=loss_of)
            x = torch.rand(shape, device=run.device)
            of_work = methods
            if name in LOOPS:  # on the grid is the default there; memopt wants multi-step modules
                of_work = (*FIRST, "default") if methods is FIRST else ("compiled",)
            elif dtype is not None and methods is FIRST:  # membranes in float32, as stock's have no kernel
                of_work = (*FIRST, "fused")
            for method in of_work:
                run.row(work, method, seconds, partial(measure, work, workload, method, x))
        if methods is FIRST:
            largest_batches(run)
            graphs(run)
            synchronized(run)


def largest_batches(run: Run) -> None:
    import snn_reversible_plugin as srp
    from benchmarks.workloads import WORKLOADS

    budget, size = ("64MiB", 16) if run.small else ("24GiB", 32)

    def largest(method: str) -> dict[str, Any]:
        model = WORKLOADS["vgg"].make().to(run.device)
        if method != "stock":
            srp.convert_to_reversible(model, mode=method)

        def batch_of(batch: int) -> torch.Tensor:
            return torch.rand(4, batch, 2, size, size, device=run.device)

        if size != 32:  # the head takes 8 x 8
            model = model[:-2]
        return {"note": f"{srp.largest_batch(model, batch_of, budget)} in {budget}"}

    for method in ("stock", "memory"):
        run.row("VGG, largest batch", method, 40, partial(largest, method))


def main(arguments: list[str] | None = None) -> int:
    """Run it all; 1 if anything is not equal to what it has to be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to import from")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    if options.wheels is not None:
        carry(options.wheels)
    if not (torch.cuda.is_available() or options.small):
        print("There is no GPU here: --small runs all of it on the CPU.", file=sys.stderr)
        return 2
    from benchmarks import gpu_checks

    run = Run(options.out, options.minutes, options.small)
    run.forms = gpu_checks.form_names(run.device)
    families = gpu_checks.cases(run.device, run.small)
    run.checks = {name: {"cases": len(of), "checked": 0, "wrong": {}} for name, of in families.items()}
    for case in first_of_each(families):
        run.check(case)
    train(run)
    run.reserved = 0
    for case in others(families):
        run.check(case)
    run.save()
    print(run.tables())
    failures = run.failures()
    if failures:
        print("", "Not equal, or not checked:", *failures, sep="\n", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
