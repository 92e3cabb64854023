"""Spatial learning through time: back-propagation that leaves out the paths through time.

The one idea: with the membrane detached in the charge, the graph of a step ends at its own inputs, so the
loss of each step is back-propagated as soon as the step is done, and memory does not grow with T. An
approximation of back-propagation through time, good where membranes forget quickly.

Source: Meng et al., "Towards memory- and time-efficient backpropagation for training spiking neural
networks", ICCV 2023, algorithms 1 (SLTT) and 2 (SLTT-K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from snn_reversible_plugin.modules.as_it_ran import unchanged
from snn_reversible_plugin.modules.kinds import is_multi_step
from snn_reversible_plugin.modules.states import cut
from snn_reversible_plugin.ops.autocast import without_autocast
from snn_reversible_plugin.training.carried import CarriedStates, Watch, refuse_time_mixing

# NOTE [What a step is, and what is cut]
#
# 1. A step is one call of the model: on [N, ...], or on a sequence of one step [1, N, ...] where the model
#    is in SpikingJelly's multi-step mode. Nothing in the model is switched: a forward that flattens from
#    dimension 2, or ends in mean(0), was written for its own mode.
# 2. Everything that enters a step from an earlier one is detached before it enters: membranes and synaptic
#    currents, the spikes that a recurrent layer feeds back, states of modules of the user's own. Parameters
#    act within the step and get their gradient there, a learned decay from its product with the detached
#    membrane.
# 3. Gradients are added to `.grad` in the order of the steps. One backward over all steps adds them from
#    the last to the first, so beyond two steps it agrees to rounding, not to the bit.
# 4. A step that is not back-propagated runs without a graph; it moves states and statistics all the same.
# 5. Autocast caches a parameter's cast, graph or no graph: a cast from a step without a graph would
#    take the gradient away from later ones. The cache is emptied before each step that has a graph.
# 6. The gradient of a loss of the mean output is the same for every output, loss'(mean) / T, but is known
#    only after the last step. So the steps run once without a graph, and then again from the same states,
#    statistics and random numbers.


@dataclass(frozen=True)
class SLTTResult:
    """What :func:`sltt_backward` returns; unpacks as ``loss, output``.

    ``loss``: the loss, detached. ``output``: the mean over all steps of what the model returned for each,
    detached, at least in float32. ``states``: the final states, where the model was given its states.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> from snn_reversible_plugin.training import sltt_backward
        >>> net = nn.Sequential(layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 2))
        >>> result = sltt_backward(net, torch.rand(5, 3, 4), lambda out: out.square().mean())
        >>> loss, output = result
        >>> output.shape, loss.requires_grad
        (torch.Size([3, 2]), False)
    """

    loss: Tensor
    output: Any
    states: tuple[Any, ...] = field(default=(), repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.output))


def sltt_backward(
    model: nn.Module,
    x_seq: Tensor | Sequence[Tensor],
    loss_fn: Callable[..., Tensor],
    k: int | None = None,
    *,
    loss_on: str = "step",
    target_seq: Sequence[Any] | None = None,
    states: tuple[Any, ...] | None = None,
    step_mode: str | None = None,
    generator: torch.Generator | None = None,
    scaler: Any = None,
) -> SLTTResult:
    """Forward and backward of one batch with the gradient through space only, in memory independent of T.

    Takes the place of forward and ``loss.backward()``: gradients are added to the parameters' ``.grad``, as
    a backward does. They are those of back-propagation through time with every state detached between
    two steps, an approximation. Works on stock and on converted models, SpikingJelly's and snnTorch's.
    The model starts from the states that it has, so reset it before a new sequence, and is left with the
    final ones.

    Args:
        model: SpikingJelly network in either step mode, snnTorch network with ``init_hidden=True``, or,
            with ``states``, any ``model(x, *states)`` that returns ``(output, *states)``.
        x_seq: inputs of the T steps, ``[T, N, ...]``, or a sequence of T tensors ``[N, ...]``.
        loss_fn: from what the model returns for a step to a scalar loss; called as
            ``loss_fn(output, target_seq[t])`` where ``target_seq`` is given. A model in step mode "m"
            is called with, and returns, a sequence of one step, so its ordinary ``loss_fn`` (of
            ``output.mean(0)``, say) fits.
        k: SLTT-K: back-propagate at ``k`` of the T steps, drawn at random without replacement; the
            expected gradient is k / T of that at all steps, as in the published code. None: all steps.
        loss_on: ``"step"``: the mean over T of the loss of each step's output. ``"mean"``: the loss of
            the mean output; takes one more forward, and forward hooks run twice.
        target_seq: targets of the T steps, or weights, or both.
        states: states at the start, where the model takes and returns them.
        step_mode: "s": the model is called with ``[N, ...]``; "m": with ``[1, N, ...]``; None: "m" where
            one of its SpikingJelly modules is in step mode "m". "m" also suits a forward that loops
            over ``x_seq`` itself and carries its states over from call to call.
        generator: draws the ``k`` steps; None: torch's default generator of the CPU.
        scaler: a ``torch.amp.GradScaler``; the loop calls its ``step`` and ``update``. The caller's
            autocast holds for the forward and the loss; the backward runs without.

    Returns:
        :class:`SLTTResult`: ``loss, output = sltt_backward(...)``; nothing in it waits for the device.

    Raises:
        ValueError: an argument out of its range; an ``x_seq`` with a graph; a model that starts its states
            anew in its forward, loops over time itself, or mixes time steps; no loss with a gradient.
        RuntimeError: gradients are disabled.
        TypeError: ``model`` is no module, or does not return its states.

    An exception leaves the states as they were before the call; ``.grad`` keeps what earlier steps added.
    Under ``DistributedDataParallel`` gradients are exchanged once, at the last step with a backward.

    Example:
        >>> import torch
        >>> from spikingjelly.activation_based import functional, layer, neuron
        >>> from snn_reversible_plugin.training import sltt_backward
        >>> model = torch.nn.Sequential(layer.Linear(8, 16), neuron.LIFNode(), layer.Linear(16, 4))
        >>> x_seq, label = torch.rand(100, 2, 8), torch.tensor([0, 3])
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> loss, output = sltt_backward(model, x_seq, lambda y: loss_fn(y, label), k=10)
        >>> functional.reset_net(model)
        >>> output.shape
        torch.Size([2, 4])
    """
    steps = _check(model, x_seq, k, loss_on, target_seq, states, step_mode)
    chosen = set(range(steps))
    if k is not None and k < steps:
        device = "cpu" if generator is None else generator.device
        chosen = set(torch.randperm(steps, generator=generator, device=device)[:k].tolist())
    walk = _Walk(model, x_seq, chosen, states, step_mode or _step_mode_of(model))
    scale: Callable[[Tensor], Tensor] = scaler.scale if scaler is not None else lambda loss: loss
    with walk.carried.restored_on_error(), _fresh_casts():
        if loss_on == "mean":
            return _loss_of_mean(walk, loss_fn, scale)
        return _loss_of_steps(walk, loss_fn, target_seq, scale)


class _Walk:
    """The steps of one sequence, one after the other; states are cut between them."""

    def __init__(
        self,
        model: nn.Module,
        x_seq: Any,
        chosen: set[int],
        states: tuple[Any, ...] | None,
        step_mode: str,
    ) -> None:
        self.model, self.x_seq, self.steps = model, x_seq, len(x_seq)
        self.chosen, self.last_chosen = chosen, max(chosen)
        self.first_states, self.states = states, states
        self.multi_step = step_mode == "m"
        self.carried = CarriedStates(model)

    def run(self, with_graph: bool, each: Callable[[int, Any], None]) -> None:
        """Run all steps; ``each(t, output)`` is called inside the step's context, before the cut."""
        self.states = cut(self.first_states)
        self.carried.cut()
        watch = Watch(self.model, self.states is not None)
        for t in range(self.steps):
            graph = with_graph and t in self.chosen
            with torch.set_grad_enabled(graph), self._unsynchronized(t) if graph else nullcontext():
                if graph:
                    torch.clear_autocast_cache()
                with watch if t < 2 else nullcontext():
                    output = self._step(t)
                each(t, output)
                del output
            self.states = cut(self.states)
            self.carried.cut()
            if t == 0:
                watch.note_states(self.model)

    def _step(self, t: int) -> Any:
        x = self.x_seq[t]
        if self.multi_step:
            x = x.unsqueeze(0)
        if self.states is None:
            return self.model(x)
        result = self.model(x, *self.states)
        if not isinstance(result, (tuple, list)) or len(result) != 1 + len(self.states):
            found = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
            raise TypeError(
                f"{type(self.model).__name__} was called with x and {len(self.states)} states, and "
                f"returned {found}: it has to return (output, *states) with as many states; several "
                "outputs go into one tuple."
            )
        output, *states = result
        self.states = tuple(states)
        return output

    def _unsynchronized(self, t: int) -> AbstractContextManager[Any]:
        no_sync = getattr(self.model, "no_sync", None)
        return no_sync() if no_sync is not None and t != self.last_chosen else nullcontext()


def _loss_of_steps(walk: _Walk, loss_fn: Any, target_seq: Any, scale: Any) -> SLTTResult:
    total: Tensor | None = None
    mean = _Mean(walk.steps)
    trained = False

    def each(t: int, output: Any) -> None:
        nonlocal total, trained
        loss = loss_fn(output) if target_seq is None else loss_fn(output, target_seq[t])
        _check_loss(loss)
        if loss.requires_grad and torch.is_grad_enabled():
            trained = True
            with without_autocast():
                scale(loss / walk.steps).backward()
        loss = loss.detach()
        total = loss if total is None else total + loss
        mean.add(output)

    walk.run(True, each)
    if not trained:
        raise ValueError(_NO_GRADIENT)
    assert total is not None
    return SLTTResult(total / walk.steps, mean.value(), walk.states or ())


def _loss_of_mean(walk: _Walk, loss_fn: Any, scale: Any) -> SLTTResult:
    mean = _Mean(walk.steps)
    with unchanged(walk.model):
        walk.run(False, lambda _t, output: mean.add(output))
    output = tree_map(
        lambda leaf: leaf.requires_grad_() if isinstance(leaf, Tensor) else leaf, mean.value()
    )
    loss = loss_fn(output)
    _check_loss(loss)
    if not loss.requires_grad:
        raise ValueError(_NO_GRADIENT)
    with without_autocast():
        scale(loss).backward()
    gradients = [leaf.grad for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    trained = False

    def each(t: int, output: Any) -> None:
        nonlocal trained
        if t not in walk.chosen:
            return
        found = [
            (leaf, (gradient / walk.steps).to(leaf.dtype))
            for leaf, gradient in zip(_floating(output), gradients, strict=True)
            if leaf.requires_grad and gradient is not None
        ]
        if found:
            trained = True
            with without_autocast():
                torch.autograd.backward([leaf for leaf, _ in found], [grad for _, grad in found])

    walk.run(True, each)
    if not trained:
        raise ValueError(_NO_GRADIENT)
    output = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
    return SLTTResult(loss.detach(), output, walk.states or ())


class _Mean:
    """The mean of the outputs of all steps, leaf by leaf; what is no floating-point tensor becomes None."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.total: Any = None

    def add(self, output: Any) -> None:
        with torch.no_grad():
            if self.total is None:
                self.total = tree_map(_summand, output)
                return
            for total, leaf in zip(_floating(self.total), _floating(output), strict=True):
                total.add_(leaf)

    def value(self) -> Any:
        return tree_map(
            lambda leaf: leaf.div_(self.steps) if isinstance(leaf, Tensor) else leaf, self.total
        )


def _summand(leaf: Any) -> Tensor | None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return None
    return leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32), copy=True)


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """See the note, 5: no cast of a step without a graph is left behind."""
    try:
        yield
    finally:
        torch.clear_autocast_cache()


_NO_GRADIENT = (
    "no loss of a step that is back-propagated has a gradient: are all parameters frozen, or does loss_fn "
    "detach the output?"
)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = (
            f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        )
        raise ValueError(f"loss_fn returned {found}: it has to return a tensor with one value")


def _step_mode_of(model: nn.Module) -> str:
    return "m" if any(map(is_multi_step, model.modules())) else "s"


def _check(
    model: nn.Module,
    x_seq: Any,
    k: int | None,
    loss_on: str,
    target_seq: Any,
    states: Any,
    step_mode: str | None,
) -> int:
    """Refuse what can't work before anything runs; the number of steps."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, not {type(model).__name__}")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "sltt_backward computes gradients: call it outside of no_grad and inference_mode"
        )
    steps = len(x_seq)
    if steps == 0:
        raise ValueError("x_seq has no time steps: give [T, N, ...] with T of 1 or more")
    if k is not None and not 1 <= k <= steps:
        raise ValueError(f"k is {k} of {steps} time steps: give 1 to {steps}, or None for all")
    if loss_on not in ("step", "mean"):
        raise ValueError(f"loss_on must be 'step' or 'mean', not {loss_on!r}")
    if step_mode not in (None, "s", "m"):
        raise ValueError(f"step_mode must be 's', 'm' or None, not {step_mode!r}")
    if target_seq is not None and loss_on == "mean":
        raise ValueError("target_seq has a target for each step: it needs loss_on='step'")
    if target_seq is not None and len(target_seq) != steps:
        raise ValueError(f"target_seq has {len(target_seq)} steps, x_seq {steps}: give one target a step")
    if states is not None and not isinstance(states, (tuple, list)):
        raise TypeError(
            f"states must be a tuple of what model(x, *states) takes, not {type(states).__name__}"
        )
    if any(x.grad_fn is not None for x in ([x_seq] if isinstance(x_seq, Tensor) else x_seq)):
        raise ValueError(
            "x_seq has a graph behind it, which the first step's backward would free: make what computed "
            "it part of the model, or detach it"
        )
    refuse_time_mixing(model, states is not None)
    return steps
