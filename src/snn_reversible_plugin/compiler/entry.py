"""``compile``: one line in a script, and the compiled network's backward starts from bits.

The one idea: it returns what ``torch.compile`` returns, with another backend; only the first call is
looked at before it is traced, because a loop over a thousand time steps is better off on the tape.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin import convert
from snn_reversible_plugin.compiler import loops
from snn_reversible_plugin.compiler.backend import MODES, Backend, missing, patches_of
from snn_reversible_plugin.compiler.membranes import FinalMembranes
from snn_reversible_plugin.modules.checks import check_model


def compile(  # named as torch's
    model: nn.Module,
    *,
    mode: str = "memory",
    torch_mode: str | None = None,
    **options: Any,
) -> Any:
    """Compile a spiking network so that its backward starts from packed spikes.

    As ``torch.compile(model)``: the same arithmetic, the same speed, and what is stored from forward to
    backward is a bit a spike and little else, where the compiler would store floats. The model may be
    stock or converted, of either framework, or with neurons of your own; parameters, ``state_dict``,
    optimizers and resets of states are as with ``torch.compile``.

    The first call is run once without a graph, to see how long its loops over time are. Beyond 128 time
    steps, and where this torch lacks a hook, nothing is compiled: the model is converted and runs on the
    tape, and a warning says so.

    Args:
        model: an ``nn.Module``.
        mode: ``"memory"`` computes everything again in the backward that can be, ``"speed"`` all but
            convolutions and matrix products, whose results are stored.
        torch_mode: ``torch.compile``'s own ``mode``.
        options: ``torch.compile``'s other arguments; its ``options`` are Inductor's configuration.

    Returns:
        What ``torch.compile`` returns: a module around ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or is compiled or scripted, or ``backend`` is given.
        ValueError: an unknown ``mode``.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = torch.nn.Sequential(layer.Linear(8, 8), neuron.LIFNode(step_mode="m"))
        >>> compiled = srp.compile(net)  # compiles when it is first called
        >>> next(compiled.parameters()) is net[0].weight
        True
    """
    check_model(model)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}; torch.compile's own is torch_mode")
    if "backend" in options:
        raise TypeError("compile has a backend of its own; for another one use torch.compile")
    patches = patches_of(torch_mode, options.pop("options", None))
    backend = Backend(mode, patches)
    compiled: Any = torch.compile(model, backend=backend, **options)
    look = FirstLook(model, compiled.forward, backend, options)
    object.__setattr__(compiled, "forward", look)
    return compiled


def look_of(model: Any) -> Any:
    """What stands in front of the forward of a model that :func:`compile` made; None for any other."""
    look = getattr(model, "__dict__", {}).get("forward")
    return look if isinstance(look, FirstLook) else None


class FirstLook:
    """Stands in front of a compiled model's forward, and decides once, with the first inputs, what it is.

    Attributes:
        backend: what compiles it.
        options: what ``torch.compile`` was given beside.
        on_tape: why nothing is compiled; None where it is, or before the first call.
    """

    def __init__(self, model: nn.Module, forward: Any, backend: Backend, options: dict[str, Any]) -> None:
        self._model, self._forward = model, forward
        self.backend, self.options = backend, options
        self.on_tape: str | None = None
        self._decided = False
        self._membranes = FinalMembranes(model, backend.calls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._decided and not torch.compiler.is_compiling():
            self._decided = True
            self.on_tape = self._why_on_tape(args, kwargs)
            if self.on_tape is not None:
                self._run_on_tape(self.on_tape)
        # Memory that CUDA graphs own is none to let go of.
        if self.on_tape or self.backend.patches.get("triton.cudagraphs") or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        with self._membranes.promised(args, kwargs):
            return self._forward(*args, **kwargs)

    def _why_on_tape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if lacking := missing():
            return f"torch {torch.__version__} lacks {lacking}"
        if stepped := loops.is_too_long(self._model, args, kwargs):
            return (
                f"one call steps {stepped!r} more than {loops.MOST_UNROLLED} times, and the compiler would "
                "unroll that loop"
            )
        return None

    def _run_on_tape(self, why: str) -> None:
        warnings.warn(
            f"{type(self._model).__name__} is not compiled: {why}. It is converted instead "
            f"(convert_to_reversible, mode={self.backend.mode!r}), and runs on the tape.",
            stacklevel=5,
        )
        if not isinstance(self._model, convert.Recorded):
            convert.convert_to_reversible(self._model, mode=self.backend.mode)
        self._forward = self._model.__call__
