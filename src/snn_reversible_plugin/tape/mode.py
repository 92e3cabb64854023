"""When a tape records: the dispatch mode without what it does with an operation.

The one idea: all that may keep an operation off the tape is asked once, in front of everything else,
because it is asked for each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from snn_reversible_plugin.tape.off_stack import never_compiled, set_compiler
from snn_reversible_plugin.tape.surroundings import OwnMode

Args = tuple[Any, ...]
Rule = Callable[[Any, Any, Args, dict[str, Any]], torch.Tensor | None]
"""Runs an operator, given the tape, it and its arguments; None: it is one like any other."""

_NO_NAMES: dict[str, Any] = {}
_graph_task = torch._C._current_graph_task_id


class Recording(OwnMode, TorchDispatchMode):
    """A mode whose operations :meth:`run` records.

    Attributes:
        pauses: how many want nothing recorded for the time being.
        may_promise: whether states may be left as promises.
    """

    def __init__(self) -> None:
        super().__init__()
        # A block that is rebuilt records inside a backward; what a backward itself runs is not recorded.
        self._graph_task = _graph_task()
        self.may_promise = not self.in_backward
        self._rules: dict[Any, Rule] = {}  # of operators that somebody else runs for the time being
        self._suspended = 0
        self.pauses = 0

    def run(self, func: Any, types: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and write it down."""
        raise NotImplementedError

    @property
    def in_backward(self) -> bool:
        """Whether it records a block that a backward rebuilds, so that nothing of it outlives this call."""
        return self._graph_task != -1

    @property
    def keeps_everything(self) -> bool:
        """Whether it is suspended."""
        return self._suspended > 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, everything is kept."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    @contextmanager
    def overriding(self, rules: dict[Any, Rule]) -> Iterator[None]:
        """Inside, these operators are run by rules."""
        outer, self._rules = self._rules, self._rules | rules
        try:
            yield
        finally:
            self._rules = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.pauses or _graph_task() != self._graph_task:
            return func(*args, **(kwargs or _NO_NAMES))
        # Where something is compiled under a tape, what runs here is not: see OffStack.
        compiler = set_compiler(None)
        try:
            return self.run(func, types, args, kwargs or _NO_NAMES)
        finally:
            set_compiler(compiler)

    _is_left_to_torch = not never_compiled(__torch_dispatch__.__code__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # As a rule torch does the same in two calls of its own around each of this.
        return cls._is_left_to_torch
