"""What a kernel has to know of a surrogate, as data.

The one idea: a neuron fires by a comparison and learns by one formula, so its surrogate is a name and a few
numbers, and a compiled form is chosen by the name. The formula itself, in its framework's order of
operations, comes along as a function for everybody else.

Source: surrogate gradients, Neftci, Mostafa and Zenke, IEEE Signal Processing Magazine 36, 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.witness import agree
from snn_reversible_plugin.ops.autocast import Autocast

Vjp = Callable[[Tensor, Tensor], Tensor]
"""``vjp(grad, u)``: the gradient of u from that of the output. It may overwrite u, never grad."""


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """A firing function of ``u = membrane - threshold``, element by element, and its surrogate gradient.

    Args:
        vjp: the gradient, see :data:`Vjp`.
        fire: from u to the output. None: the Heaviside step, 1 where ``u >= 0``.
        binary: ``fire`` gives zeros and ones.
        strict: the Heaviside step is 1 where ``u > 0``, and 0 at zero.
        uniform: an element's bits don't depend on where in memory it lies (see ``ops/chunks.py``).
        name: whose formula it is. None: a closure, which no compiled form takes.
        parameters: what the name leaves open, in the formula's own words.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.neurons.surrogates import Surrogate
        >>> triangle = Surrogate(lambda grad, u: grad * (1 - u.abs()).clamp_min(0), uniform=True)
        >>> u = torch.tensor([-0.5, 0.0, 2.0])
        >>> triangle.fired(u), triangle.vjp(torch.ones(3), u)
        (tensor([0., 1., 1.]), tensor([0.5000, 1.0000, 0.0000]))
    """

    vjp: Vjp
    fire: Callable[[Tensor], Tensor] | None = None
    binary: bool = False
    strict: bool = False
    uniform: bool = False
    name: str | None = None
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def spikes(self) -> bool:
        """Whether its outputs are zeros and ones."""
        return self.fire is None or self.binary

    def fired(self, u: Tensor) -> Tensor:
        """The output for u, which is left as it is."""
        if self.fire is not None:
            return self.fire(u)
        return (u > 0 if self.strict else u >= 0).to(u)


def by_autograd(function: Callable[[Tensor], Tensor]) -> Vjp:
    """The gradient of any function, as autograd computes it."""
    autocast = Autocast()

    def vjp(grad: Tensor, u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        with torch.enable_grad(), autocast.again():
            s = function(u)
        return torch.autograd.grad(s, u, grad)[0]

    return vjp


def describes(surrogate: Surrogate, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether a surrogate has the outputs and the gradient of a function, bit for bit on a sample.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.neurons.surrogates import Surrogate, describes
        >>> squares = [Surrogate(lambda grad, u, by=by: grad * (by * u), torch.square) for by in (2, 3)]
        >>> [describes(square, torch.square, torch.float32) for square in squares]
        [True, False]
    """

    def sample() -> Tensor:
        spread = torch.linspace(-3, 3, 203, dtype=torch.float64, device="cpu")
        near = torch.arange(2048, dtype=torch.float64, device="cpu").sin_()
        return torch.cat((torch.zeros_like(spread[:1]), spread, near)).to(dtype)

    def incoming(out: Tensor) -> Tensor:
        return torch.arange(out.numel(), dtype=torch.float64, device="cpu").cos_().to(out.dtype)

    def ours() -> list[Tensor]:
        u = sample()
        out = surrogate.fired(u)
        return [out, surrogate.vjp(incoming(out), u)]

    def theirs() -> list[Tensor]:
        u = sample().requires_grad_()
        out = function(u)
        return [out, *torch.autograd.grad(out, u, incoming(out))]

    return agree(ours, theirs)


# Formulas that the compiled steps know, by what the functions are called there.
_COMPILED = {"snntorch.atan": "atan", "snntorch.fast_sigmoid": "fast_sigmoid"}


@functools.lru_cache(maxsize=256)
def in_one_pass(surrogate: Surrogate) -> Callable[..., None] | None:
    """``write(membrane, threshold, grad, out)`` of a surrogate, flat and float32 on the CPU, to its bits.

    None where nothing is compiled for it.
    """
    form: Any = steps_on(torch.device("cpu"))
    write = getattr(form, _COMPILED.get(surrogate.name or "", ""), None)
    if write is None:
        return None
    write = functools.partial(write, **dict(surrogate.parameters))

    def sample() -> tuple[Tensor, Tensor]:
        membrane = torch.linspace(-3, 4, 1001, dtype=torch.float32, device="cpu")
        return membrane, torch.arange(1001, dtype=torch.float32, device="cpu").cos_()

    def compiled() -> list[Tensor]:
        membrane, grad = sample()
        out = torch.empty_like(membrane)
        write(membrane, 0.7, grad, out)
        return [out]

    def formula() -> list[Tensor]:
        membrane, grad = sample()
        return [surrogate.vjp(grad, membrane - 0.7)]

    return write if agree(compiled, formula) else None
