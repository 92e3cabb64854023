"""Running a program stock and converted, and making one that fails shorter.

The one idea: in stock arithmetic the converted network is held to the stock one, else to autograd through
its own forward; what stock refuses isn't asked of the converted one. Mode minimal cuts small layers, too.
"""

from __future__ import annotations

import functools
import random
import threading
import traceback
import warnings
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy
import torch

import snn_reversible_plugin as srp
from fuzz.program import HEADER, SMALL_SLICE, Settings
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.tape.sliced import cut

SAME, REFUSED = "same", "refused by stock"
ROUNDING, HALF = 1e-4, 3e-2  # of a gradient in mode minimal, and of the largest one; in half precision


def verdict(source: str, settings: Settings) -> str:
    """``SAME``, ``REFUSED``, or what is wrong."""
    try:
        expected = _outcome(source, settings, reversibly=False)
    except Exception as error:  # whatever a random program runs into
        return f"{REFUSED}: {type(error).__name__}: {str(error)[:100]}"
    try:
        got = _outcome(source, settings, reversibly=True)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"raises {type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
    if len(expected) != len(got):
        return f"{len(got)} results instead of {len(expected)}"
    rounding = 0.0
    if settings.mode == "minimal":
        rounding = HALF if "bfloat16" in source else ROUNDING
    room = rounding * _largest(expected)
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        if (found := _difference(a, b, rounding, room)) is not None:
            return f"differs: result {number} of {len(expected)}, {found}"
    return SAME


def _largest(results: list[Any]) -> float:
    """The largest value of gradients, outputs and parameters."""
    floating = [one for one in results if one is not None and one.is_floating_point() and one.numel()]
    return max((float(one.nan_to_num(0.0, 0.0, 0.0).abs().max()) for one in floating), default=0.0)


def _difference(a: Any, b: Any, rounding: float, room: float) -> str | None:
    if a is None or b is None:
        return None if a is b else f"{type(b).__name__} instead of {type(a).__name__}"
    if a.dtype is not b.dtype or a.shape != b.shape:
        return f"{b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    if torch.equal(a, b) or torch.equal(a.nan_to_num(77.0), b.nan_to_num(77.0)):
        return None
    if room and torch.allclose(a, b, rtol=rounding, atol=room, equal_nan=True):
        return None
    return f"by {float((a.double() - b.double()).abs().max()):g}, shape {tuple(a.shape)}"


def _outcome(source: str, settings: Settings, reversibly: bool) -> list[Any]:
    names: dict[str, Any] = {}
    on_grid = settings.arithmetic != "stock"
    convert = functools.partial(
        srp.convert_to_reversible, mode=settings.mode, arithmetic=settings.arithmetic
    )
    small = patch.dict(cut.STEP, cpu=SMALL_SLICE) if settings.mode == "minimal" else nullcontext()
    with warnings.catch_warnings(), small:
        warnings.simplefilter("ignore")
        exec(HEADER, names)
        exec(source, names)
        names["converted"] = reversibly
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)  # noqa: NPY002
        net = names["make"]()
        if reversibly or on_grid:
            convert(net)
        names["recorded"] = srp.reversible if reversibly else lambda _: nullcontext()
        names["again"] = convert if reversibly else names["again"]
        by_autograd = on_grid and not reversibly
        names["in_thread"] = lambda function: _in_thread(function, by_autograd)
        torch.manual_seed(1)
        with differentiated(net) if by_autograd else nullcontext():
            seen = names["train"](net)
        return [*seen, *net.state_dict().values(), *(p.grad for p in net.parameters())]


def _in_thread(function: Any, by_autograd: bool) -> Any:
    results: list[Any] = []

    def run() -> None:
        torch.set_num_threads(1)  # of a new thread, whatever this one's is: sums don't depend on it then
        try:
            with switches.autograd() if by_autograd else nullcontext():
                results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = results[0]
    if error is not None:
        raise error
    return value


def shortened(source: str, settings: Settings) -> str:
    """The program without lines that its fault doesn't need; a line goes with what is indented below it."""
    kind = verdict(source, settings)[:7]
    lines = source.splitlines()
    at = 0
    while at < len(lines):
        depth = len(lines[at]) - len(lines[at].lstrip())
        end = at + 1
        while (
            end < len(lines) and lines[end].strip() and len(lines[end]) - len(lines[end].lstrip()) > depth
        ):
            end += 1
        shorter = [*lines[:at], *lines[end:]]
        if lines[at].strip() and verdict("\n".join(shorter) + "\n", settings)[:7] == kind:
            lines = shorter
        else:
            at += 1
    return "\n".join(lines) + "\n"
