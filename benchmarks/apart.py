"""A measurement in a process of its own: nothing that another one left in memory or caches decides it."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from .experiment import Tick

Environment = Mapping[str, str | None]  # None takes a variable out


class Died(Exception):
    """The process ended without a result; the text says how."""


def apart(
    function: Callable[..., Any], *arguments: Any, tick: Tick = str, environment: Environment | None = None
) -> Any:
    """What ``function(tick, *arguments)`` gives in a new process; both have to be picklable.

    Raises:
        Died: the process was killed, or the function raised; then with its traceback.
    """
    spawn = mp.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_child, args=(theirs, function, arguments))
    with mock.patch.dict(os.environ):
        for name, value in (environment or {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        child.start()
    theirs.close()
    try:
        while (message := ours.recv())[0] == "tick":
            tick(message[1])
    except EOFError:
        child.join()
        raise Died(f"the process died with exit code {child.exitcode}") from None
    except BaseException:  # whoever interrupts this one has both end
        child.terminate()
        raise
    child.join()
    kind, found = message
    if kind == "error":
        raise Died(found)
    return found


def _child(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(("result", function(lambda text: pipe.send(("tick", text)), *arguments)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))
