"""One GPU, under eight minutes: kernels held to their references, then times and memory of training steps.

    python benchmarks/gpu.py [--small] [--minutes 7.5] [--out out/gpu.json] [--wheels FOLDER]

Needs torch and Triton, and no network. Where SpikingJelly and snnTorch are not installed, ``--wheels``
names a folder with their wheels and those of what they import (``pip download spikingjelly snntorch -d
FOLDER``). Each row is printed and stored when it is done, so that a run that is cut short has what it had;
the tables come last. Without a GPU, ``--small`` runs all of it on the CPU at small shapes: that shows that
it runs, and its figures mean nothing. Its minutes are the process's own there, whatever else the CPU does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
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
from typing import Any

import torch

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


class OutOfTime(Exception):
    """A row took longer than it may."""


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
        self.checks: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def check(self, name: str, holds: Callable[[], bool]) -> None:
        """Whether something is equal to its reference."""
        try:
            with self.at_most(60):
                found = "equal" if holds() else "DIFFERENT"
        except Exception as error:
            found = f"{type(error).__name__}: {error}".splitlines()[0]
        self.checks[name] = found
        print(f"{name:60} {found}", flush=True)
        self.save()

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
        left = min(seconds, self.end - self.clock())
        if left < 1:
            raise OutOfTime("no time left")

        def stop(*_: Any) -> None:
            raise OutOfTime(f"took more than {left:.0f} s")

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
        self.out.write_text(json.dumps(about | {"checks": self.checks, "rows": self.rows}, indent=1))

    def tables(self) -> str:
        """All of it, as Markdown."""
        lines = ["", "| held to its reference | |", "|---|---|"]
        lines += [f"| {name} | {found} |" for name, found in self.checks.items()]
        names = ("held_mib", "peak_mib", "ms", "to_stock", "note")
        lines += ["", f"| work | method | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
        for row in self.rows:
            cells = [str(row.get(name, "")) for name in names[:-1]]
            note = row.get("why_not") or row.get("note", "")
            lines.append(f"| {row['work']} | {row['method']} | {' | '.join(cells)} | {note} |")
        return "\n".join(lines)


# -- every kernel ------------------------------------------------------------------------------------------


def check_kernels(run: Run) -> None:
    from snn_reversible_plugin.ops import forms
    from snn_reversible_plugin.ops.bits import reference as bits_reference

    device = run.device
    for operation in (forms.BITS, forms.GRID_STEP, forms.SEQUENCE):
        form = forms.form_of(operation, device)
        where = "none here" if form is None else form.__name__.removeprefix("snn_reversible_plugin.")
        run.checks[f"form of {operation}"] = where

    def bits() -> bool:
        form: Any = forms.form_of(forms.BITS, device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64):
            for each in range(1, 5):
                for n in (1, 7, 1024, 100_003):
                    flat = torch.randint(2**each, (n,), device=device).to(dtype)
                    packed, out = form.pack_bits(flat, each), torch.zeros_like(flat)
                    form.unpack_bits(packed, out, each)
                    expected = bits_reference.pack_bits(flat, each)
                    if not (torch.equal(packed, expected) and torch.equal(out, flat)):
                        return False
        return True

    run.check("bits, every width and dtype", bits)
    check_steps(run)
    check_gradients(run)
    check_orders(run)
    check_networks(run)


def check_steps(run: Run) -> None:
    from snn_reversible_plugin.grid import decays
    from snn_reversible_plugin.grid.step import Record, reference, steps_on

    form, scale, n = steps_on(run.device), 2.0**16, 4099

    def there_and_back(reset: str, beta: float, gain: float | None) -> bool:
        on_host = run.device.type == "cpu"
        u = (torch.randn(n, device=run.device) * scale).round().div(scale)
        x, theta = torch.randn(n, device=run.device), 0.75
        step = decays.Step(decays.decay_of(beta, beta, beta, "check"), theta * scale, reset, scale, gain)
        spikes, out, expected = (torch.empty_like(u) for _ in range(3))
        bits = None if reset == decays.NONE else form.fire(u, theta, False, spikes)
        of_reference = None if bits is None else reference.fire(u, theta, False, spikes)
        pieces, _, _ = form.charge(u, x, bits, step, Record(), out)
        reference.charge(u, x, of_reference, step, None, expected)
        pieces = [torch.as_tensor(piece) for piece in pieces]
        record = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=run.device)
        back = form.undo(out, x, bits, step, record.numpy() if on_host else record)
        return torch.equal(out, expected) and torch.equal(back, u)

    for reset in (decays.NONE, decays.SUBTRACT, decays.BEFORE, decays.AFTER):
        run.check(
            f"steps on the grid, reset: {reset}",
            lambda reset=reset: all(
                there_and_back(reset, float(torch.tensor(beta)), gain)
                for beta in (1.0, 0.9, 0.5, 1 / 3)
                for gain in (None, 0.5)
            ),
        )


NAMES = ("Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf")


def check_gradients(run: Run) -> None:
    import snntorch
    from spikingjelly.activation_based import surrogate

    from snn_reversible_plugin.neurons.surrogates import in_one_pass
    from snn_reversible_plugin.snntorch.surrogates import known_surrogate
    from snn_reversible_plugin.spikingjelly.surrogates import as_autograd

    known = [as_autograd(getattr(surrogate, name)()) for name in NAMES]
    of_snntorch = "atan", "fast_sigmoid", "sigmoid"
    known += [known_surrogate(getattr(snntorch.surrogate, name)()) for name in of_snntorch]
    for one in known:
        # A formula is compiled only where it gives the bits of torch's; a CPU has forms for some.
        run.check(
            f"surrogate in one pass: {one.name}",
            lambda one=one: in_one_pass(one, run.device) is not None or run.device.type == "cpu",
        )


def check_orders(run: Run) -> None:
    """Sequences in the orders of SpikingJelly's older releases, to the formulas."""
    from spikingjelly.activation_based import surrogate

    from snn_reversible_plugin.neurons.integrate_fire import in_place, on_device, reference
    from snn_reversible_plugin.spikingjelly.surrogates import as_autograd

    orders = {
        "0.0.0.0.12": reference.Order(
            v_reset_first=True, v_seq_last=True, scales=True, selects=True, cats=True, numbers=True
        ),
        "0.0.0.0.14": reference.Order(reset_together=True, charge_together=True, scales=True, selects=True),
        "0.0.0.0.14, ParametricLIF": reference.Order(reset_together=True, scales=True, selects=True),
    }
    x, v, *gradients = torch.randn(4, 5, 1031, device=run.device).unbind(0)
    wanted = reference.Wanted(x=True, v=True, q=True)

    def agrees(order: Any, learns: bool) -> bool:
        for number, name in enumerate(NAMES):
            for v_reset in (None, 0.0, -0.3):
                for decay_input, detach, starts in ((True, False, True), (False, number % 2 == 0, False)):
                    rule = reference.Rule(None if learns else 1.7, decay_input, 0.8, v_reset, detach, order)
                    q = torch.tensor(0.37, device=run.device) if learns else None
                    plain = reference.Neuron(rule, as_autograd(getattr(surrogate, name)()), q)
                    form = plain._replace(launched=on_device.takes(plain, run.device))
                    start: Any = v[0] if starts else rule.rest
                    given = reference.OutputGradients(gradients[0], gradients[1][0], gradients[1])
                    theirs = reference.sequence(x, start, plain, True)
                    there = in_place.multi_step(x, start, form, True)
                    back = in_place.multi_step_vjp(x, start, given, form, wanted)
                    expected = reference.sequence_vjp(x, start, given, plain, wanted)
                    pairs = [*zip(there, theirs, strict=True), (back.x, expected.x)]
                    pairs += [*zip(back.v, expected.v, strict=True), *zip(back.q, expected.q, strict=True)]
                    if not all(a is b or torch.equal(a, b) for a, b in pairs):
                        return False
        return True

    for version, order in orders.items():
        run.check(
            f"sequences in the order of {version}",
            lambda order=order, version=version: agrees(order, learns="P" in version),
        )


def check_networks(run: Run) -> None:
    """Converted neurons and loops to stock's own operators, and to autograd on the grid, on this device."""
    import copy

    from spikingjelly.activation_based import neuron, surrogate

    import snn_reversible_plugin as srp
    from snn_reversible_plugin.convert import differentiated

    def outcome(node: Any, x: torch.Tensor) -> list[torch.Tensor]:
        node.reset()
        x = x.detach().requires_grad_()
        spikes = node(x) if node.step_mode == "m" else torch.stack([node(one) for one in x])
        weights = torch.linspace(-1, 1, spikes.numel(), device=x.device).view(spikes.shape)
        ((spikes * weights).sum() + node.v.square().sum()).backward()
        assert x.grad is not None
        gradients = [p.grad.clone() for p in node.parameters() if p.grad is not None]
        node.zero_grad()
        return [spikes.detach(), node.v.detach(), x.grad, *gradients]

    def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    x_seq = torch.randn(5, 3, 67 if run.small else 1031, device=run.device).mul(1.5).add(0.4)
    for cls in (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode):

        def sequences(cls: Any = cls) -> bool:
            for name in NAMES:
                for v_reset in (None, 0.0, -0.3):
                    for detach in (False, True):
                        stock = cls(
                            v_reset=v_reset, detach_reset=detach, step_mode="m",
                            surrogate_function=getattr(surrogate, name)(),
                        ).to(run.device)  # fmt: skip
                        ours = srp.convert_to_reversible(copy.deepcopy(stock))
                        for layout in (x_seq, x_seq.transpose(1, 2).contiguous().transpose(1, 2)):
                            if not equal(outcome(ours, layout), outcome(stock, layout)):
                                return False
                        assert ours.treatment in ("analytic", "generic replay"), ours.treatment
            return True

        def loops(cls: Any = cls) -> bool:
            for number, name in enumerate(NAMES):
                function, v_reset = getattr(surrogate, name)(), (None, 0.0, -0.3)[number % 3]
                node = cls(v_reset=v_reset, step_mode="s", surrogate_function=function).to(run.device)
                srp.convert_to_reversible(node)
                with srp.reversible(node):
                    ours = outcome(node, x_seq)
                with differentiated(node):
                    theirs = outcome(node, x_seq)
                if not equal(ours, theirs):
                    return False
            return True

        run.check(f"sequences to stock's operators: {cls.__name__}", sequences)
        run.check(f"loops on the grid to autograd: {cls.__name__}", loops)


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
            found[name] = round(size / 2**20, 1)
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
    from benchmarks.methods import Training, prepare
    from benchmarks.workloads import WORKLOADS

    stocks: dict[str, float] = {}

    def measure(work: str, workload: Any, method: str, x: torch.Tensor) -> dict[str, Any]:
        torch.manual_seed(0)
        model = workload.make().to(run.device)
        if method == "compiled":
            # All but the code generation, which takes a CPU minutes.
            compiled = torch.compile(model, backend="aot_eager" if run.small else "inductor")
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


def graphs(run: Run) -> None:
    """A whole step in a CUDA graph: its gradients to the eager step's, and its time."""
    import snn_reversible_plugin as srp
    from benchmarks.measure import _now
    from benchmarks.workloads import WORKLOADS

    def captured(name: str, shape: tuple[int, ...], method: str) -> dict[str, Any]:
        if run.device.type != "cuda":
            return {"note": "there are no CUDA graphs here"}
        workload = WORKLOADS[name]
        model, x = workload.make().to(run.device), torch.rand(shape, device=run.device)
        if method != "stock":
            srp.convert_to_reversible(model)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad()
                workload.loss_of(model, x).backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        workload.loss_of(model, x).backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            workload.loss_of(model, x).backward()
        times = []
        for _ in range(10):
            start = _now(run.device)
            graph.replay()
            times.append(_now(run.device) - start)
        srp.look_at_graphs()
        # Each replay adds nothing: the graph begins with gradients of its own.
        found = [p.grad for p in model.parameters() if p.grad is not None]
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        note = "gradients are the eager step's" if same else "GRADIENTS DIFFER from the eager step's"
        return {"ms": round(1e3 * statistics.median(times), 2), "note": note}

    for name, shape in (("vgg", (8, 16, 2, 32, 32)), ("leaky-loop", (50, 32, 512))):
        for method in ("stock", "memory"):
            run.row(f"{name}, captured in a graph", method, 30, partial(captured, name, shape, method))


def synchronized(run: Run) -> None:
    """SyncBatchNorm in a group of one: gradients to stock's."""

    def compared() -> dict[str, Any]:
        if run.device.type != "cuda":
            return {"note": "SyncBatchNorm wants a GPU"}
        import copy

        import snn_reversible_plugin as srp
        from benchmarks.workloads import WORKLOADS

        with tempfile.NamedTemporaryFile() as file:
            torch.distributed.init_process_group(
                "nccl", init_method=f"file://{file.name}.store", rank=0, world_size=1
            )
            try:
                workload = WORKLOADS["vgg"]
                stock = torch.nn.SyncBatchNorm.convert_sync_batchnorm(workload.make()).to(run.device)
                ours = srp.convert_to_reversible(copy.deepcopy(stock))
                x, gradients = torch.rand(4, 8, 2, 32, 32, device=run.device), []
                for model in (stock, ours):
                    workload.loss_of(model, x).backward()
                    gradients.append([p.grad for p in model.parameters()])
                same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
            finally:
                torch.distributed.destroy_process_group()
        return {"note": "gradients are stock's" if same else "GRADIENTS DIFFER from stock's"}

    run.row("VGG, SyncBatchNorm", "memory", 30, compared)


def main() -> int:
    """Run it all; 1 if a kernel differs from its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to import from")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    if options.wheels is not None:
        carry(options.wheels)
    if not (torch.cuda.is_available() or options.small):
        print("There is no GPU here: --small runs all of it on the CPU.", file=sys.stderr)
        return 2
    run = Run(options.out, options.minutes, options.small)
    check_kernels(run)
    train(run)
    print(run.tables())
    return int("DIFFERENT" in run.checks.values())


if __name__ == "__main__":
    sys.exit(main())
