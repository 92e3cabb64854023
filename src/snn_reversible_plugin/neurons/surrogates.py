"""What a kernel has to know of a surrogate, as data.

The one idea: a neuron fires by a comparison and learns by one formula, so its surrogate is a name and a few
numbers, and a compiled form is chosen by the name. The formula itself, in its framework's order of
operations, comes along as a function for everybody else.

Source: surrogate gradients, Neftci, Mostafa and Zenke, IEEE Signal Processing Magazine 36, 2019.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.witness import agree, alone
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
        users: a function that a user wrote, seen to be a comparison on a sample only.

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
    users: bool = False

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


# NOTE [Surrogates that users wrote]
#
# 1. On the grid spikes are a comparison, computed by a kernel, and a surrogate is asked for gradients only.
#    A function that somebody else wrote may stand there if it is that comparison: 0 below the threshold,
#    1 above, one of both at it, everywhere on a sample that reaches from the grid's finest step to 2^20.
# 2. It must be a function: what draws random numbers, learns, or gives no gradient is none, or not of its
#    input alone. `of_users` says which of these it saw.
# 3. A sample is no proof. So on a CPU each step compares the function's spikes with the kernel's, and
#    leaves the grid where they differ. On a device that would be a wait: there the sample has to do.
#    Say `lambda u: (u > 0) & (u < 100)` passes no sample with 2^20 in it; one with `u < 2**21` is found in
#    the step that charges past it.


def of_users(function: Callable[[Tensor], Tensor]) -> Surrogate | str:
    """What is known of a function that a user wrote, float32 in and out; or why it is none for the grid.

    Example:
        >>> import torch
        >>> class Triangle(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, u):
        ...         ctx.save_for_backward(u)
        ...         return (u > 0).float()
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad * (1 - ctx.saved_tensors[0].abs()).clamp_min(0)
        >>> of_users(Triangle.apply).strict
        True
        >>> of_users(torch.sigmoid)
        'its surrogate is no comparison with the threshold'
    """
    try:
        return _users[function]
    except (KeyError, TypeError):  # not asked yet, or there are no weak references to it
        pass
    if isinstance(function, torch.nn.Module) and any(True for _ in function.parameters()):
        return "its surrogate learns"
    states = torch.get_rng_state()
    try:
        with alone():
            found = _seen(function)
            drawn = not torch.equal(torch.get_rng_state(), states)
    except Exception:  # it doesn't take what a membrane may be
        found, drawn = "its surrogate does not take a vector of float32", False
    torch.set_rng_state(states)
    if drawn:
        found = "its surrogate draws random numbers"
    try:
        _users[function] = found
    except TypeError:
        return "its surrogate can't be told from others"
    return found


def _seen(function: Callable[[Tensor], Tensor]) -> Surrogate | str:
    powers = 2.0 ** torch.arange(-23, 21, device="cpu", dtype=torch.float32)
    near = torch.linspace(-3, 3, 203, dtype=torch.float32, device="cpu")
    u = torch.cat((torch.zeros_like(near[:1]), powers, -powers, near)).requires_grad_()
    out = function(u)
    if not isinstance(out, Tensor) or out.dtype is not torch.float32 or out.shape != u.shape:
        return "its surrogate does not give a float32 for each"
    values = u.detach()
    strict = not bool(out[0] > 0)
    if not torch.equal(out.detach(), (values > 0 if strict else values >= 0).float()):
        return "its surrogate is no comparison with the threshold"
    if not out.requires_grad:
        return "its surrogate has no gradient"
    if _leaves(out) != {id(u)}:
        return "its surrogate learns"
    (grad,) = torch.autograd.grad(out, u, torch.ones_like(out), allow_unused=True)
    if grad is None or grad.shape != u.shape:
        return "its surrogate has no gradient"
    return Surrogate(by_autograd(function), strict=strict, users=True)


def _leaves(out: Tensor) -> set[int]:
    """The leaves of a graph."""
    found, waiting, seen = set(), [out.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


_users: weakref.WeakKeyDictionary[Any, Surrogate | str] = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=256)
def in_one_pass(surrogate: Surrogate, device: torch.device) -> Callable[..., None] | None:
    """``write(membrane, threshold, grad, out)`` of a surrogate, flat and float32 on a device, to its bits.

    None where nothing is compiled for it. Waits for the device, the first time.
    """
    compile_ = getattr(steps_on(device), "in_one_pass", None)
    write = (
        None
        if compile_ is None or surrogate.name is None
        else compile_(surrogate.name, dict(surrogate.parameters))
    )
    if write is None:
        return None

    def sample() -> tuple[Tensor, Tensor]:
        membrane = torch.linspace(-3, 4, 1001, dtype=torch.float32, device="cpu")
        return membrane.to(device), torch.arange(1001, dtype=torch.float32, device="cpu").cos_().to(device)

    def compiled() -> list[Tensor]:
        membrane, grad = sample()
        out = torch.empty_like(membrane)
        write(membrane, 0.7, grad, out)
        return [out]

    def formula() -> list[Tensor]:
        membrane, grad = sample()
        return [surrogate.vjp(grad, membrane - 0.7)]

    return write if agree(compiled, formula) else None
