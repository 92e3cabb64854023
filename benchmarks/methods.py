"""How a workload is trained: stock, as its users train it today, and with this package.

A method turns a stock model into a :class:`Training`, or raises :class:`CannotRun` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from spikingjelly.activation_based import base, functional, layer, memopt, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks.wrapped import wrapped_chains
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.training import sltt_backward

from .peers.checkpointed import checkpoint_blocks
from .peers.published import PublishedChain, publish
from .workloads import Workload


class CannotRun(Exception):
    """The method does not apply to the workload; the text says why."""


@dataclass
class Training:
    """A model made ready by a method, and how a step of it runs.

    ``loss_of`` runs the forward. Where forward and backward can't be told apart it is None and ``step``
    runs both. ``plain`` is given where the forward is not stock's: the same forward under autograd alone.
    """

    model: nn.Module
    loss_of: Callable[[torch.Tensor], torch.Tensor] | None
    step: Callable[[torch.Tensor], object] | None = None
    plain: Training | None = None

    def run(self, x: torch.Tensor) -> None:
        """Forward and backward."""
        if self.loss_of is None:
            assert self.step is not None
            self.step(x)
        else:
            self.loss_of(x).backward()


Make = Callable[[], nn.Module]
Prepare = Callable[[Workload, Make, torch.Tensor], Training]


@dataclass(frozen=True)
class Method:
    """A row of the tables: how a model is made ready, and how the method is explained and drawn.

    Args:
        about: of it in the list of methods; empty leaves it out of the list.
        ours: whether it is this package's.
    """

    name: str
    prepare: Prepare
    about: str
    color: str
    marker: str
    ours: bool

    @property
    def label(self) -> str:
        return f"this package: {self.name}" if self.ours else self.name


def _training(workload: Workload, model: nn.Module, plain: Training | None = None) -> Training:
    return Training(model, lambda x: workload.loss_of(model, x), plain=plain)


def _chains(model: nn.Module) -> list[srp.RevSSequence]:
    """The model's reversible chains, those that surgery keeps beside the modules included."""
    chains = [module for module in model.modules() if isinstance(module, srp.RevSSequence)]
    return chains + [wrapped.chain for wrapped in wrapped_chains(model)]


def _plainly(model: nn.Module) -> nn.Module:
    for chain in _chains(model):
        chain.reversible = False
    return model


class Branch(nn.Sequential):
    """A branch of a reversible block, of a type of its own to be named as a target."""


def _targets(workload: Workload, model: nn.Module) -> tuple[type[nn.Module], ...]:
    """What its user would checkpoint: the workload's blocks, or the branches of reversible ones."""
    for chain in _chains(model):
        for block in chain.blocks:
            block.f, block.g = Branch(block.f), Branch(block.g)
    return workload.blocks or (Branch,)


def _stock(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
    return _training(workload, _plainly(make()))


def _checkpoint(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
    model = _plainly(make())
    if workload.checkpointed is not None:
        loss_of = workload.checkpointed
        return Training(model, lambda x: loss_of(model, x))
    return _training(workload, checkpoint_blocks(model, _targets(workload, model)))


def _memopt(level: int) -> Prepare:
    def method(workload: Workload, make: Make, x: torch.Tensor) -> Training:
        if workload.checkpointed is not None:
            raise CannotRun("needs multi-step modules; this loop is the user's own")
        if level > 1 and not x.is_cuda:
            raise CannotRun("levels 2 to 4 search by CUDA's peak memory")
        model = _plainly(make())
        memopt.optimize_memory(
            model,
            _targets(workload, model),
            example_forward=lambda net: workload.loss_of(net, x),
            level=level,
            split_fn=_parts,
            can_chunk=lambda module: isinstance(module, (nn.Conv1d, nn.Conv2d, neuron.BaseNode)),
        )
        return _training(workload, model)

    return method


def _parts(module: nn.Module) -> tuple[nn.Module, ...]:
    """What memopt may split: any container of neurons or of SpikingJelly's stepped layers."""
    leaf = isinstance(module, (base.StepModule, nn.modules.conv._ConvNd)) and not isinstance(
        module, (nn.Sequential, layer.SeqToANNContainer)
    )
    return () if leaf else tuple(module.children())


def _published(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
    if not _chains(model := make()):
        raise CannotRun("needs a network built of reversible blocks")
    plain = _plainly(make())
    for chain in _chains(plain):
        for block in chain.blocks:
            block.bits = None
    return _training(workload, publish(model), plain=_training(workload, plain))


def _sltt(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
    if workload.checkpointed is not None:
        raise CannotRun("steps the network itself; this loop is the user's own")
    model = make()
    if _chains(model):
        raise CannotRun("a chain with fresh states in each call can't be stepped")

    def step(x: torch.Tensor) -> None:
        functional.reset_net(model)
        sltt_backward(model, x, _loss_of_step)

    return Training(model, None, step)


def _loss_of_step(out: torch.Tensor) -> torch.Tensor:
    """The workload's loss, of the output of one step, with or without a dimension of time."""
    return out.reshape(-1, *out.shape[-2:]).mean(0).square().sum()


def _offload(workload: Workload, make: Make, x: torch.Tensor) -> Training:
    if not x.is_cuda:
        raise CannotRun("there is nowhere else to save on a CPU")
    model = _plainly(make())

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return workload.loss_of(model, x)

    return Training(model, loss_of)


def _autocast(workload: Workload, make: Make, x: torch.Tensor) -> Training:
    model = _plainly(make())

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return workload.loss_of(model, x)

    return Training(model, loss_of)


def _tape(mode: str) -> Prepare:
    def method(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
        model = srp.convert_to_reversible(_plainly(make()), mode=mode, arithmetic="stock")
        return _training(workload, model)

    return method


def _grid(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
    model, plain = _plainly(make()), _plainly(make())
    try:
        srp.convert_to_reversible(model, arithmetic="grid")
    except ValueError as error:
        if "grid" not in str(error):
            raise
        raise CannotRun("nothing in it computes on the grid") from None
    srp.convert_to_reversible(plain, arithmetic="grid")
    return _training(workload, model, Training(plain, lambda x: _by_autograd(workload, plain, x)))


def _by_autograd(workload: Workload, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with differentiated(model):
        return workload.loss_of(model, x)


def _blocks(tape: str | None) -> Prepare:
    def method(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
        model, plain = make(), None
        if not _chains(model):
            if tape == "speed":
                raise CannotRun("shown for networks that are built of reversible blocks")
            model, plain = _wrapped(workload, make), _training(workload, _plainly(_wrapped(workload, make)))
        if tape is not None:
            for chain in _chains(model):
                chain.mode = tape
            srp.convert_to_reversible(model, arithmetic="stock")
        return _training(workload, model, plain)

    return method


def _wrapped(workload: Workload, make: Make) -> nn.Module:
    if workload.checkpointed is not None:
        raise CannotRun("has no residual blocks")
    model = make()
    try:
        srp.wrap_residual_blocks(model)
    except ValueError as error:
        raise CannotRun(str(error).splitlines()[0]) from None
    return model


def _compiled(compile_: Callable[[nn.Module], Any]) -> Prepare:
    def method(workload: Workload, make: Make, _x: torch.Tensor) -> Training:
        torch._dynamo.reset()
        model = _plainly(make())
        called = compile_(model)
        return Training(model, lambda x: workload.loss_of(called, x))

    return method


_TAPE = 'this package, `mode="{}"` and `arithmetic="stock"`'
_PEERS = (
    ("stock", _stock, "the framework as it is; reversible blocks run plainly", "0.45", "o"),
    (
        "checkpoint", _checkpoint, "`torch.utils.checkpoint` by hand, over blocks or over stretches of "
        "about √T steps, with neuron states handed through and running statistics counted once",
        "tab:brown", "v",
    ),
    (
        "memopt 1", _memopt(1), "SpikingJelly's memory optimizer, level 1; levels 2 to 4 need CUDA",
        "tab:orange", "s",
    ),
    ("memopt 2", _memopt(2), "", "tab:orange", "p"),
    ("memopt 3", _memopt(3), "", "tab:orange", "h"),
    ("memopt 4", _memopt(4), "", "tab:orange", "H"),
    (
        "published", _published, "the published reversible procedure: streams in floating point, two runs "
        "of each branch", "tab:pink", "P",
    ),
    (
        "offload", _offload,
        "`torch.autograd.graph.save_on_cpu`: what is saved goes to the host and back; on a GPU alone",
        "tab:gray", "1",
    ),
    (
        "autocast", _autocast, "stock under `torch.autocast` in bfloat16: other numbers",
        "gold", "*",
    ),
    ("SLTT", _sltt, "no gradient through time: an approximation", "tab:red", "X"),
    (
        "compiled", _compiled(torch.compile),
        "stock under `torch.compile`: on the page [Compiled](compile.md)", "black", "o",
    ),
)  # fmt: skip
_OURS = (
    ("speed", _tape("speed"), _TAPE.format("speed"), "tab:green", "^"),
    ("auto", _tape("auto"), _TAPE.format("auto"), "teal", "^"),
    ("memory", _tape("memory"), _TAPE.format("memory"), "tab:blue", "D"),
    ("minimal", _tape("minimal"), _TAPE.format("minimal"), "navy", "D"),
    (
        "grid", _grid, 'this package, `arithmetic="grid"`, which is the default for neurons stepped in a '
        "loop", "tab:cyan", "d",
    ),
    (
        "compiled, speed", _compiled(partial(srp.compile, mode="speed")),
        'this package, `srp.compile(model, mode="speed")`', "limegreen", "^",
    ),
    (
        "compiled, memory", _compiled(srp.compile), "this package, `srp.compile(model)`",
        "deepskyblue", "D",
    ),
    (
        "blocks", _blocks(None), "this package, reversible blocks alone; stock residual networks are "
        "wrapped, which changes the function", "tab:olive", "<",
    ),
    (
        "blocks + tape", _blocks("memory"), 'this package, reversible blocks with `mode="memory"` in a '
        "converted network", "tab:purple", ">",
    ),
    (
        "blocks + tape, speed", _blocks("speed"), 'the same, blocks with `mode="speed"`, which is their '
        "default", "plum", ">",
    ),
)  # fmt: skip
METHODS = {
    row[0]: Method(*row, ours=ours) for rows, ours in ((_PEERS, False), (_OURS, True)) for row in rows
}


COMPILED = tuple(name for name in METHODS if name.startswith("compiled"))


def prepare(name: str, workload: Workload, stock: nn.Module, x: torch.Tensor) -> Training:
    """The workload under a method, with the stock model's weights.

    Models are made anew rather than copied: snnTorch resets the neurons that were constructed, not copies.
    """

    def make() -> nn.Module:
        model = workload.make().to(x.device)
        model.load_state_dict(stock.state_dict())
        return model

    return METHODS[name].prepare(workload, make, x)


def rebuild_error(model: nn.Module) -> float | None:
    """The largest error of a rebuilt chain input, where chains were told to check."""
    errors = [chain.last_rebuild.max_error for chain in _chains(model) if chain.last_rebuild is not None]
    errors += [
        module.rebuild_error
        for module in model.modules()
        if isinstance(module, PublishedChain) and module.rebuild_error is not None
    ]
    return max(errors, default=None)


def check_rebuilds(model: nn.Module, on: bool) -> None:
    for chain in (*_chains(model), *(m for m in model.modules() if isinstance(m, PublishedChain))):
        chain.check = on
