"""The demonstration: one network trained twice on real events, stock and converted, side by side.

The idea: both networks start from one seed and take each step on the same batch, one right after
the other. So their losses can be compared bit by bit while they train, and the times of their steps
see the same load on the machine.

Source: the network is a small one of SpikingJelly's own layers, in the manner of its convolutional
tutorial; the data are `snn_reversible_plugin.data.DigitSaccades`.
"""

import math
import statistics
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table
from torch import nn

from snn_reversible_plugin.convert import convert_to_reversible
from snn_reversible_plugin.modules.as_it_ran import unchanged
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.reports.over_step import OverStep, over_step
from snn_reversible_plugin.reports.pictures import draw_over_step, new_figure
from snn_reversible_plugin.reports.timing import TimeRatio

try:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    from snn_reversible_plugin.data import DigitSaccades, event_frames
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the demo needs SpikingJelly, tonic and scikit-learn ({error}): "
        "pip install 'snn-reversible-plugin[all]'",
        name=error.name,
    ) from error


class NoStep(ValueError):
    """The epochs, the recordings and the batch that were asked for are no training step."""


def network(width: int = 32, size: int = 24) -> nn.Module:
    """A stock SpikingJelly network: three convolutional layers of neurons and a linear one.

    It runs in multi-step mode: from event frames ``[T, N, 2, H, W]`` with H and W from 8 up, it
    makes scores ``[T, N, 10]``.

    Args:
        width: channels of each convolution.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.demo import network
        >>> network(4)(torch.rand(5, 2, 2, 24, 24)).shape
        torch.Size([5, 2, 10])
    """

    def block(number: int, channels: int) -> dict[str, nn.Module]:
        return {
            f"conv{number}": layer.Conv2d(channels, width, 3, padding=1, bias=False),
            f"norm{number}": layer.BatchNorm2d(width),
            f"lif{number}": neuron.LIFNode(detach_reset=True, surrogate_function=surrogate.ATan()),
        }

    parts = {
        **block(1, 2),
        "pool1": layer.MaxPool2d(2),
        **block(2, width),
        "pool2": layer.MaxPool2d(2),
        **block(3, width),
        "flatten": layer.Flatten(),
        "linear": layer.Linear(width * (size // 4) ** 2, 10),
    }
    model = nn.Sequential(OrderedDict(parts))
    functional.set_step_mode(model, "m")
    return model


@dataclass
class Run:
    """What was seen of one of the two networks.

    Attributes:
        losses: of each step.
        seconds: that each step took: forward, backward and the optimizer.
        accuracy: on the test part, from 0 to 1.
        held: bytes that live between forward and backward, beyond parameters and input.
        peak: bytes at the worst moment of a step, counted in the same way.
        over: a step from beginning to end, counted by the CPU's allocator; None on other devices.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    held: int = 0
    peak: int = 0
    over: OverStep | None = None


@dataclass
class Comparison:
    """The stock network beside the converted one.

    Example:
        >>> from snn_reversible_plugin.demo import Comparison, Run
        >>> both = Comparison(Run([0.5, 0.25], [1.0, 1.0]), Run([0.5, 0.25], [1.5, 1.25]))
        >>> both.equal_steps, both.largest_difference, both.time_ratio.median
        (2, 0.0, 1.375)
    """

    stock: Run
    converted: Run

    @property
    def equal_steps(self) -> int:
        """The number of steps whose two losses are equal, bit for bit."""
        return sum(a == b for a, b in self._losses())

    @property
    def largest_difference(self) -> float:
        """The largest difference between the two losses of a step."""
        return max(abs(a - b) for a, b in self._losses())

    @property
    def time_ratio(self) -> TimeRatio:
        """Time of the converted network over that of the stock one, step by step."""
        return TimeRatio.of(self.converted.seconds, self.stock.seconds)

    def _losses(self) -> "zip[tuple[float, float]]":
        return zip(self.stock.losses, self.converted.losses, strict=True)

    def table(self) -> Table:
        """The comparison as a rich table."""
        a, b = self.stock, self.converted
        steps = len(a.losses)
        table = Table(title="One network, trained twice from one seed")
        table.add_column("")
        for name in ("stock", "converted", ""):
            table.add_column(name, justify="right")
        equal = self.equal_steps == steps
        table.add_row(
            "losses equal, bit for bit",
            "",
            f"{self.equal_steps} of {steps} steps",
            "[green]all[/]" if equal else f"[red]up to {self.largest_difference:.1e} apart[/]",
        )
        table.add_row("last loss", f"{a.losses[-1]:.6f}", f"{b.losses[-1]:.6f}", "")
        table.add_row("test accuracy", f"{a.accuracy:.1%}", f"{b.accuracy:.1%}", "")
        for name, old, new in (
            ("held between forward and backward", a.held, b.held),
            ("peak of a step", a.peak, b.peak),
        ):
            gain = f"[bold]{old / new:.1f}x less[/]"
            table.add_row(name, shown(old), shown(new), gain)
        table.add_row(
            "time of a step",
            f"{statistics.median(a.seconds):.3f} s",
            f"{statistics.median(b.seconds):.3f} s",
            "",
        )
        table.caption = f"time of a step, of stock's: {self.time_ratio}"
        return table

    def plot(self) -> Any:
        """The comparison as a matplotlib ``Figure``: memory over the step, both losses, memory as bars."""
        a, b = self.stock, self.converted
        grey, blue = "#b8bec8", "#1f5fbf"
        if a.over is None or b.over is None:
            figure = new_figure(10, 4)
            curve, bars = figure.subplots(1, 2, width_ratios=(3, 2))
        else:
            figure = new_figure(10, 8)
            places = figure.add_gridspec(2, 2, width_ratios=(3, 2))
            over = figure.add_subplot(places[0, :])
            draw_over_step(over, a.over, b.over)
            over.set_title("memory over one training step")
            over.spines[["top", "right"]].set_visible(False)
            curve, bars = figure.add_subplot(places[1, 0]), figure.add_subplot(places[1, 1])
        curve.plot(a.losses, color=grey, linewidth=5, label="stock")
        curve.plot(b.losses, color=blue, linewidth=1, label="converted")
        curve.set(xlabel="training step", ylabel="loss", ylim=(0, 1.1 * curve.get_ylim()[1]))
        curve.set_title(f"{self.equal_steps} of {len(a.losses)} losses equal, bit for bit")
        curve.legend(frameon=False)

        for shift, colour, run in ((-0.2, grey, a), (0.2, blue, b)):
            drawn = bars.bar([shift, 1 + shift], [run.held, run.peak], 0.36, color=colour)
            bars.bar_label(drawn, labels=[shown(run.held), shown(run.peak)], padding=2)
        bars.set_xticks([0, 1], ["held between\nforward and backward", "peak of a step"])
        bars.set_yticks([])
        bars.margins(y=0.12)
        bars.set_title(
            f"{a.held / b.held:.0f}x less held, {a.peak / b.peak:.1f}x less at the peak,\n"
            f"time {self.time_ratio}",
            fontsize="small",
        )
        for axes in (curve, bars):
            axes.spines[["top", "right"]].set_visible(False)
        bars.spines["left"].set_visible(False)
        return figure


def compare(
    *,
    epochs: int = 5,
    steps: int = 10,
    batch_size: int = 32,
    width: int = 32,
    size: int = 24,
    limit: int | None = None,
    seed: int = 0,
    mode: str = "memory",
    device: str | torch.device = "cpu",
    console: Console | None = None,
) -> Comparison:
    """Train the `network` twice on `DigitSaccades`, stock and converted, in step.

    Args:
        epochs: rounds through the training part, 1 or more.
        steps: event frames in a recording, T.
        batch_size: recordings in a batch, N.
        width: channels of each convolution.
        size: width and height of the simulated sensor, in pixels.
        limit: recordings of each part to use; None uses all, 1437 to train on and 360 to test on.
        seed: of both networks and of the order of the recordings.
        mode: of the conversion, as in `convert_to_reversible`.
        device: where to train. On a GPU cuDNN is kept to its deterministic algorithms, as without
            that not even two stock networks stay equal.
        console: where progress is shown; None shows it on stderr.

    Raises:
        NoStep: there is no training step to take, with the arguments as they are.

    Example:
        >>> from snn_reversible_plugin.demo import compare
        >>> both = compare(epochs=1, steps=4, batch_size=8, width=4, size=16, limit=16)
        >>> both.equal_steps == len(both.stock.losses) == 2
        True
    """
    console = console or Console(stderr=True)
    training = event_frames(
        DigitSaccades(size=size, limit=limit),
        steps=steps,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        seed=seed,
    )
    test = event_frames(
        DigitSaccades(train=False, size=size, limit=limit), steps=steps, batch_size=4 * batch_size
    )
    recordings: Any = training.dataset
    total = epochs * len(training)
    if total < 1:
        raise NoStep(
            f"{epochs} epochs of {len(recordings)} recordings in full batches of {batch_size} are no step "
            "at all: give more epochs or recordings, or smaller batches"
        )
    for i in track(range(len(recordings)), "recording events", console=console, transient=True):
        recordings[i]  # the cache keeps it, so that no step's time has the camera's in it

    trainers = []
    for converted in (False, True):
        torch.manual_seed(seed)
        model = network(width, size).to(device)
        if converted:
            model = convert_to_reversible(model, mode=mode)
        trainers.append(_Trainer(model, total, device))

    x, digit = next(iter(training))
    for trainer in trainers:
        trainer.measure(x, digit)

    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[stock]} stock, {task.fields[converted]} converted"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=total, stock="", converted="")
        for _ in range(epochs):
            for x, digit in training:
                # Who goes first changes, so that neither always finds the caches warm.
                taken = len(trainers[0].run.losses)
                for trainer in trainers if taken % 2 == 0 else trainers[::-1]:
                    trainer.step(x, digit)
                stock, converted_ = (f"{trainer.run.losses[-1]:.6f}" for trainer in trainers)
                progress.update(task, advance=1, stock=stock, converted=converted_)

    for trainer in trainers:
        trainer.test(test)
    return Comparison(*(trainer.run for trainer in trainers))


class _Trainer:
    """An ordinary training loop, cut where the other network's has to come in between."""

    def __init__(self, model: nn.Module, total: int, device: str | torch.device) -> None:
        self.model, self.device, self.run = model, torch.device(device), Run()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=total)

    def loss(self, x: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
        functional.reset_net(self.model)
        return nn.functional.cross_entropy(self.model(x).mean(0), digit)

    @torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    def step(self, x: torch.Tensor, digit: torch.Tensor) -> None:
        x, digit = x.to(self.device), digit.to(self.device)
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(x, digit)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self._wait()
        self.run.seconds.append(time.perf_counter() - start)
        self.run.losses.append(loss.item())

    def measure(self, x: torch.Tensor, digit: torch.Tensor) -> None:
        x, digit = x.to(self.device), digit.to(self.device)
        step = partial(self.loss, x, digit)
        # Each starts from a network without states: torch warns of what is freed while somebody counts, and
        # was made before.
        with unchanged(self.model):
            step().backward()
        with unchanged(self.model):
            self.run.held, self.run.peak = count_step(step)
        if self.device.type == "cpu":
            with unchanged(self.model):
                self.run.over = over_step(self.model, step)

    @torch.no_grad()
    def test(self, batches: Any) -> None:
        self.model.eval()
        right = count = 0
        for x, digit in batches:
            functional.reset_net(self.model)
            guess = self.model(x.to(self.device)).mean(0).argmax(1).cpu()
            right += int((guess == digit).sum())
            count += len(digit)
        self.run.accuracy = right / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
