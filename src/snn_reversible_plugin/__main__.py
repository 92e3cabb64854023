"""The command line, ``python -m snn_reversible_plugin``.

The idea: it reads arguments and prints; what it runs is in `demo` and `report`, and is imported
only when it is wanted, so that ``--help`` is quick and needs no framework.

Source: typer, https://typer.tiangolo.com.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from snn_reversible_plugin.factory import build, move, run_once, shape_of

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    help="Train spiking neural networks in a small part of their memory.",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

EXPLANATION = """\
Spiking networks in SpikingJelly or snnTorch, trained in a small part of their
memory. In your script it is one call:

    import snn_reversible_plugin as srp
    model = srp.convert_to_reversible(model)

Here you can look before you change a line:

[bold]python -m snn_reversible_plugin demo[/]
    One network trained twice on event data, stock and converted: a table, and
    a picture of the memory over a training step. Needs the extra "all".

[bold]python -m snn_reversible_plugin report train.py:Net --shape 8,16,2,32,32[/]
    Your own model: what each layer holds and what stands at the peak, stock
    and converted. --plot report.png draws it.

[bold]python -m snn_reversible_plugin verify train.py:Net --shape 8,16,2,32,32[/]
    Whether it trains as stock does: outputs, gradients and spikes compared.

[bold]python -m snn_reversible_plugin fit train.py:Net --shape 8,N,2,32,32[/]
    How large a batch N fits, stock and in each mode. --budget 8GiB says into
    what, --plot fit.png draws it.

train.py:Net is a file, or a module as in my_package.models, and the name of
what makes the model in it: a function or class that is called without
arguments, or the model itself. --help after a command lists its options."""
NEXT = """
What to try next, on your own model and batch:
    python -m snn_reversible_plugin report train.py:Net --shape 8,16,2,32,32
    python -m snn_reversible_plugin verify train.py:Net --shape 8,16,2,32,32"""
FACTORY = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY", help="What makes the model: a module or a file, and a name in it."
    ),
]

SHAPE = Annotated[
    list[str],
    typer.Option(help="Input's shape, as in 8,16,2,32,32; once for each input of the model."),
]
DEVICE = Annotated[str, typer.Option(help="Where the model and its input live.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import snn_reversible_plugin

        typer.echo(snn_reversible_plugin.__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def explain(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which this is.")
    ] = False,
) -> None:
    """Train spiking neural networks in a small part of their memory."""
    if context.invoked_subcommand is None:
        Console().print(EXPLANATION, highlight=False)


class Mode(StrEnum):
    """What is replayed: everything replayable, only what needs no convolution or product, what has to be
    for the peak of the first, or everything, with the largest layers a slice of the batch at a time."""

    memory = "memory"
    speed = "speed"
    auto = "auto"
    minimal = "minimal"


ModeOption = Annotated[
    Mode,
    typer.Option(
        help="Spare memory all you can, keep stock's speed, both where the peak allows, or the least peak."
    ),
]


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Rounds through the training part.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Event frames in a recording, T.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Recordings in a batch.")] = 32,
    width: Annotated[int, typer.Option(min=1, help="Channels of each convolution.")] = 32,
    size: Annotated[int, typer.Option(min=8, help="Sensor's width and height in pixels.")] = 24,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Recordings of each part to use; all if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of both networks and of the data's order.")] = 0,
    mode: ModeOption = Mode.memory,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; cuda if there is one.")] = "auto",
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
) -> None:
    """Train one network twice on event data, stock and converted, and compare the two."""
    import torch

    try:
        from snn_reversible_plugin.demo import NoStep, compare
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="demo") from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    move(device, torch.nn.Linear(1, 1))
    console = Console()
    try:
        comparison = compare(
            epochs=epochs,
            steps=steps,
            batch_size=batch,
            width=width,
            size=size,
            limit=limit,
            seed=seed,
            mode=mode.value,
            device=device,
            console=console,
        )
    except NoStep as error:
        raise typer.BadParameter(str(error), param_hint="--epochs, --batch or --limit") from None
    console.print(comparison.table())
    _save(comparison, plot, console)
    console.print(NEXT, highlight=False)
    if comparison.equal_steps < len(comparison.stock.losses):
        raise typer.Exit(1)


@app.command()
def report(
    factory: FACTORY,
    shape: SHAPE,
    mode: ModeOption = Mode.memory,
    device: DEVICE = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Also draw the report, to this file.")] = None,
) -> None:
    """Show what a model holds for its backward pass, module by module, stock and converted.

    The model gets random numbers from 0 to 1 for its input.
    """
    from snn_reversible_plugin.reports.memory_report import memory_report

    model, inputs = _converted(factory, shape, mode, device)
    console = Console()
    with console.status("training steps, stock and converted"):
        result = memory_report(model, *inputs)
    result.print()
    if plot is not None:
        _save(result, plot, console)


@app.command()
def verify(factory: FACTORY, shape: SHAPE, mode: ModeOption = Mode.memory, device: DEVICE = "cpu") -> None:
    """Show whether a converted model trains as stock does: outputs, gradients and spikes of one batch.

    The model gets random numbers from 0 to 1 for its input. Fails where the guarantee does not hold.
    """
    from snn_reversible_plugin.reports.verification import verify

    model, inputs = _converted(factory, shape, mode, device)
    with Console().status("training steps, stock and converted"):
        result = verify(model, *inputs)
    result.print()
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def fit(
    factory: FACTORY,
    shape: Annotated[
        list[str],
        typer.Option(
            help="Input's shape with N for the batch and, if you like, T for the time steps, as in "
            "T,N,2,32,32; once for each input of the model."
        ),
    ],
    budget: Annotated[
        str | None, typer.Option(help="Memory for a step, as 24GiB; what is free if not given.")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="T; give it once for each number to try.")
    ] = None,
    device: DEVICE = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Also draw the batches, to this file.")] = None,
) -> None:
    """Show how large a batch fits into a budget of memory, stock and in each mode, and what a step takes.

    Parameters, gradients and inputs are in the budget, an optimizer's state is not. The model gets random
    numbers from 0 to 1 for its input.
    """
    import torch

    from snn_reversible_plugin.convert import convert_to_reversible, restore
    from snn_reversible_plugin.modules.checks import bytes_of
    from snn_reversible_plugin.reports.fit import Fits, fit, free_memory

    def shapes(count: int | None, batch: int) -> list[tuple[int, ...]]:
        sizes = {"N": batch} | ({} if count is None else {"T": count})
        return [
            shape_of(",".join(str(sizes.get(part, part)) for part in text.split(","))) for text in shape
        ]

    if not all("N" in text.split(",") for text in shape):
        raise typer.BadParameter("it needs N where the batch goes, as in 8,N,2,32,32", param_hint="--shape")
    has_steps = any("T" in text.split(",") for text in shape)
    if steps and not has_steps:
        raise typer.BadParameter("it needs a T in the shape, as in T,N,2,32,32", param_hint="--steps")
    if has_steps and not steps:
        raise typer.BadParameter(
            "a shape has T for the time steps: say how many, as in --steps 8", param_hint="--steps"
        )
    model, console, found = move(device, build(factory)), Console(), Fits(budget)
    try:
        limit = free_memory(torch.device(device)) if budget is None else bytes_of(budget)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from error
    counts: list[int | None] = [*steps] if steps else [None]
    for count in counts:
        run_once(model, [torch.rand(sizes, device=device) for sizes in shapes(count, 2)])

        def inputs(batch: int, count: int | None = count) -> tuple[Any, ...]:
            return tuple(torch.rand(sizes, device=device) for sizes in shapes(count, batch))

        for mode in ("stock", *Mode):
            with console.status(mode if count is None else f"{mode}, T={count}"):
                try:
                    restore(model) if mode == "stock" else convert_to_reversible(model, mode=mode)
                    found.rows.append((mode, count, fit(model, inputs, limit)))
                except (TypeError, ValueError) as error:
                    raise typer.BadParameter(str(error), param_hint="FACTORY") from error
    console.print(found.table())
    if plot is not None:
        _save(found, plot, console)


def _save(result: Any, path: Path, console: Console) -> None:
    """Write ``result.plot()`` to ``path``; without matplotlib there is a line that names the extra."""
    try:
        figure = result.plot()
    except ImportError as error:
        console.print(f"no picture: {error}", soft_wrap=True, markup=False)
        return
    path = path if path.suffix else path.with_suffix(".png")  # as matplotlib does
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no place for it, or an ending that matplotlib does not know
        raise typer.BadParameter(f"{path}: {error}", param_hint="--plot") from None
    console.print(f"picture: {path}", soft_wrap=True, markup=False)


def _converted(
    factory: str, shape: Sequence[str], mode: Mode, device: str
) -> "tuple[nn.Module, list[Any]]":
    """The model that a factory makes, converted, and random inputs that it takes."""
    import torch

    from snn_reversible_plugin.convert import convert_to_reversible

    shapes = [shape_of(text) for text in shape]
    model = move(device, build(factory))
    inputs = [torch.rand(sizes, device=device) for sizes in shapes]
    run_once(model, inputs)
    try:
        return convert_to_reversible(model, mode=mode.value), inputs
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="FACTORY") from error


if __name__ == "__main__":
    app(prog_name="python -m snn_reversible_plugin")
