"""T-RevSNN trained plainly, the published way, in floating point and on the grid.

A step of each on the same weights and batch: what is held between forward and backward, and what of that
are remainders; the peak of both beyond parameters, with the parameters' gradients and without; the time to
the plain run's, and what a plain run and one forward more take, which is the least for states that are
undone; and how far rebuilt states are off. "narrow" is T-RevSNN tiny, a quarter as wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.models import TRevSNN, t_rev_snn

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate, counter_on, peak_beyond_gradients, ratio
from ..peers.published_columns import PublishedColumns, publish_columns

NARROW = (16, 32, 64, 96)


def make(size: str, steps: int, way: str) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"steps": steps, "num_classes": 10}
    settings["bits"] = None if way in ("float", "published") else 16
    model = TRevSNN(NARROW, **settings) if size == "narrow" else t_rev_snn(size, **settings)
    model.columns.reversible = way != "plain"
    return publish_columns(model) if way == "published" else model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    out = model(x)
    outs = out if isinstance(out, tuple) else (out,)
    targets = torch.arange(len(outs[0]), device=x.device) % 10
    return sum(nn.functional.cross_entropy(logits, targets) for logits in outs)  # type: ignore[return-value]


def forward_alone(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def difference(model: nn.Module, x: Tensor) -> float:
    """The largest error of a rebuilt state of the first time step."""
    model.columns.check = True
    loss_of(model, x).backward()
    model.columns.check = False
    if isinstance(model.columns, PublishedColumns):
        return max(model.columns.errors)
    return 0.0 if model.columns.last_rebuild is None else model.columns.last_rebuild.max_error


def memory(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Bytes held, and at the peak with the parameters' gradients and without."""
    with counter_on(x.device) as counter:
        loss = loss_of(model, x)
        held = counter.live
        loss.backward()
    beyond = peak_beyond_gradients(counter, model)
    return {"held": held, "peak": counter.peak, "peak_beyond_gradients": beyond}


def remainders(model: nn.Module, x: Tensor) -> int:
    """Bytes of what is kept of products: a bit an element and step, where alpha is a half as at first."""
    with torch.no_grad():
        states, _ = model.columns(list(x) if model.events else model.stem(x))
    return (model.steps - 1) * sum(-(-state.numel() // 8) for state in states)


def works(options: Options) -> Iterator[Work]:
    lengths = (
        {"narrow": (4,)} if options.quick else {"tiny": (4,), "tiny_dvs": (8,), "narrow": (4, 8, 16, 32)}
    )
    for size, found in lengths.items():
        for steps in found:
            shape = [steps, 8, 2, 32, 32] if size == "tiny_dvs" else [8, 3, 64, 64]
            settings = {"size": size, "steps": steps, "shape": shape, "repeats": options.rounds(5)}
            yield Work(f"{size}, {steps}", ("plain", "published", "float", "grid"), settings)


def together(
    ways: Sequence[str], options: Options, tick: Tick, size: str, steps: int, shape: list[int], repeats: int
) -> Entries:
    models = {way: make(size, steps, way).to(options.device) for way in ways}
    x = torch.randn(shape).to(options.device)
    found = {}
    for way, model in models.items():
        tick(f"T-RevSNN {size}, {steps} sub-networks: {way}, memory")
        error = difference(model, x) if way != "plain" else 0.0
        found[way] = {"way": way, "max_error": error, **memory(model, x)}
        if way == "grid":
            found[way]["remainders"] = remainders(model, x)
        model.zero_grad()
    runs = {way: (lambda model=model: loss_of(model, x).backward()) for way, model in models.items()}
    tell = lambda way: tick(f"T-RevSNN {size}, {steps} sub-networks: {way}, time")  # noqa: E731
    seconds = alternate(
        {**runs, "forward": lambda: forward_alone(models["plain"], x)}, repeats, x.device, tell
    )
    for way, entry in found.items():
        entry["time_ratio"] = ratio(seconds[way], seconds["plain"])
        if way != "plain":
            entry["at_least"] = 1 + ratio(seconds["forward"], seconds["plain"])
    return found
