"""Random chains of reversible blocks, for networks that take all time steps in one call."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.program import Program

BRANCHES = {
    "convolution": "{n}, {conv3}, {norm}",
    "bottleneck": "{n}, {up}, {m}, {down}",
    "large weights": "{n}, {up}, {down}",
    "norm first": "{norm}, {n}, {conv3}",
    "pooling": "{n}, layer.AvgPool2d(3, 1, 1, step_mode='m'), {norm}",
    "two neurons": "{n}, nn.Sequential({conv3}, {norm}), {m}",
}
LOOPS = ("Loop(False)", "Loop(True)", "Loop(False, learn_beta=True)", "Loop(False, reset_mechanism='zero')")


def chain(program: Program, channels: int, neuron: Callable[[Program], str]) -> str:
    """A chain whose streams have so many channels; ``neuron`` gives the text of one."""
    grid = f"bits={program.pick((8, 10), 'bits')}"
    blocks = [
        f"srp.RevSBlock({_branch(program, channels, neuron)}, {_branch(program, channels, neuron)}, {grid})"
        for _ in range(program.pick((1, 1, 2, 3)))
    ]
    states, mode = program.pick(("carry", "reset"), "states"), program.pick(("speed", "memory"))
    return f"srp.RevSSequence([{', '.join(blocks)}], states={states!r}, mode={mode!r})"


def _branch(program: Program, channels: int, neuron: Callable[[Program], str]) -> str:
    kind = program.pick(tuple(BRANCHES), "branch")
    fires = [_fires(program, neuron) for _ in range(2)]
    layers = BRANCHES[kind].format(
        n=fires[0],
        m=fires[1],
        c=channels,
        conv3=f"layer.Conv2d({channels}, {channels}, 3, padding=1, bias=False, step_mode='m')",
        up=f"layer.Conv2d({channels}, 96, 3, padding=1, step_mode='m')",
        down=f"layer.Conv2d(96, {channels}, 1, step_mode='m')",
        norm=f"layer.BatchNorm2d({channels}, step_mode='m')",
    )
    return f"nn.Sequential({layers})"


def _fires(program: Program, neuron: Callable[[Program], str]) -> str:
    return (
        program.pick(LOOPS, "loop in a branch")
        if program.maybe(0.25, "snnTorch in a branch")
        else neuron(program)
    )
