"""The backend: Inductor, with the pass in front of its partitioner.

The one idea: the compiler's configuration is patched for the call, so that nothing else that the
program compiles is touched. Source: ``torch._inductor.compile_fx`` and its ``joint_custom_post_pass``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from snn_reversible_plugin import tape
from snn_reversible_plugin.compiler.membranes import Calls, Region
from snn_reversible_plugin.compiler.progress import compiling

# A graph of so many calls is most likely a loop over time, unrolled: compiling it takes minutes.
MANY_CALLS = 20_000


def missing() -> str | None:
    """What this torch lacks of what the backend is made of; None where it has all of it."""
    try:
        config = importlib.import_module("torch._inductor.config")
        importlib.import_module("torch._inductor.compile_fx")
        importlib.import_module("torch._inductor.custom_graph_pass")
    except ImportError as error:
        return str(error)
    return None if hasattr(config, "joint_custom_post_pass") else "joint_custom_post_pass"


MODES = tuple(mode for mode in tape.MODES if mode != "minimal")  # a compiler fuses what that would cut


class Backend:
    """What ``torch.compile`` hands each region to; ``packing.regions`` says what became of them."""

    def __init__(self, mode: str = "memory", patches: dict[str, Any] | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
        self.mode, self.patches = mode, patches or {}
        self.calls = Calls()
        self._packing: Any = None

    @property
    def packing(self) -> Any:
        """The pass. Inductor is imported with it, where something is compiled, as torch does."""
        if self._packing is None:
            from snn_reversible_plugin.compiler.passes import Packing

            self._packing = Packing(self.mode)
        return self._packing

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        from snn_reversible_plugin.compiler.passes import InputsAsTheyAre

        ours = {
            "joint_custom_post_pass": self.packing,
            "post_grad_custom_post_pass": InputsAsTheyAre(),
        }
        patches = STORED_IN_PASSING | self.patches | ours
        with as_planned(), compiling(calls_of(module)):
            run: Any = compile_fx(module, inputs, config_patches=patches)  # type: ignore[arg-type]
        return Region(run, None if exchanges(module) else self.calls)


# NOTE [What is stored in passing]
#
# Inductor writes an element-wise value into each of its users, unless it is stored or has become long. A
# membrane has two users a time step, the spike and the reset that reads both: of a loop over 10 steps the
# last one's would be written out 2^10 times, which is sorted out again, minutes later. Stock's membranes
# are saved for the backward, and so stored at every step. Ours are not: so what has two users and reads
# more than one value is stored, in its kernel's own loop, where no memory is taken.
STORED_IN_PASSING: dict[str, Any] = {"realize_reads_threshold": 1}


def calls_of(module: fx.GraphModule) -> int:
    """How many operations a region has."""
    return sum(node.op.startswith("call") for node in module.graph.nodes)


def exchanges(module: fx.GraphModule) -> bool:
    """Whether a region talks to other processes: it can't be called again in one of them."""
    graphs = (one.graph for one in module.modules() if isinstance(one, fx.GraphModule))
    targets = (node.target for graph in graphs for node in graph.nodes if node.op == "call_function")
    return any(
        "c10d" in str(one) or "distributed" in str(getattr(one, "__module__", "")) for one in targets
    )


# Guesses of the partitioner's about what to compute again, which look at every pair of a long loop's calls.
GUESSES = (
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
)


def as_planned() -> AbstractContextManager[None]:
    """Inside, the partitioner does what a plan says.

    It doesn't merge what the backward computes again with the forward's: what is equal within each, the
    pass has merged. And a budget of the user's has nothing to add: it even has random numbers drawn a
    second time (pytorch 190758). Nor have the partitioner's own guesses, which take long.
    """
    from torch._functorch import config

    settings: dict[str, Any] = {name: False for name in GUESSES if hasattr(config, name)}
    settings |= {"cse": False, "activation_memory_budget": 1.0}
    return config.patch(settings)  # type: ignore[no-any-return]


def patches_of(torch_mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """Inductor's configuration for a mode of ``torch.compile`` and its ``options``."""
    import torch._inductor as inductor

    chosen = {} if torch_mode in (None, "default") else inductor.list_mode_options(torch_mode)
    return {**chosen, **(options or {})}


def srp(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str = "memory",
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The entry point: ``torch.compile(model, backend="srp")``.

    ``mode`` is :func:`~snn_reversible_plugin.compile`'s, or one of ``torch.compile``'s own, which then
    goes with ``"memory"``; ``options`` are Inductor's.
    """
    calls = calls_of(module)
    if calls > MANY_CALLS:
        warnings.warn(
            f"backend='srp': a region of {calls:,} operations, most likely an unrolled loop over time; "
            "compiling it may take minutes. snn_reversible_plugin.compile looks at loops first.",
            stacklevel=2,
        )
    ours = mode in MODES
    patches = patches_of(None if ours else mode, options)
    return Backend(mode if ours else "memory", patches)(module, inputs)
