"""What is known of residual blocks: which modules make up their branches, and which can't be taken apart.

The one idea: a block is known by the forward that it runs. SpikingJelly's go by name, so that nothing is
imported and a subclass with a forward of its own is not mistaken for its base; all others by the graph of
their forward (:mod:`.structure`), or they say it themselves, by ``residual_branches`` or through a matcher.

Source: SpikingJelly 2.0, ``spikingjelly.activation_based.model``, whose forwards are written out here as
names of submodules; SEW and its connect functions from Fang et al., "Deep Residual Learning in Spiking
Neural Networks", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from snn_reversible_plugin.blocks.beside import Beside
from snn_reversible_plugin.blocks.sample import differs_on_a_sample
from snn_reversible_plugin.blocks.structure import Sums, calls_in_a_row, sums_of
from snn_reversible_plugin.blocks.wrapped import Branch
from snn_reversible_plugin.modules.kinds import is_spiking
from snn_reversible_plugin.modules.registry import StaysStock

# NOTE [What a branch is]
#
# 1. A branch is what the block adds to its input: x + branch(x). A block x = x + a(x); x = x + b(x) has
#    two. Only a block that is nothing but such sums can be wrapped: a parameter or a neuron that is in none
#    of the branches shows that it does more, unless the graph of its forward shows that nothing runs it.
# 2. SEW's AND and IAND multiply the shortcut by spikes: where the factor is zero the input is gone, and
#    nothing rebuilds it.
# 3. SpikingResNet fires after the addition, sn(x + conv(x)), which forgets the sum. Its branch here fires
#    before it, x + sn(conv(x)): SEW's ADD, with the same parameters. (x + [block(x) - x] would keep the
#    block whole, but where the blocks are silent the streams obey x_{n+1} = x_{n-1} - x_n, which grows by
#    the golden ratio a block.)

Matcher = Callable[[nn.Module], Any]
Parts = tuple[str, ...]  # submodules in the order in which a branch runs them

FIRES_EARLY = "fires before the addition; stock fires after it"
NO_SHORTCUT = "no known shortcut; a method residual_branches or a matcher can name its branch"
_ZOO = "spikingjelly.activation_based.model."
_METHOD = "residual_branches"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_branches(
    block: nn.Module, name: str, matcher: Matcher | None
) -> tuple[list[Branch], str, Beside] | None:
    """The residual branches of a block, how wrapping changes them, and what is given beside their sum.

    Args:
        block: any module.
        name: the block's, for errors.
        matcher: asked first, then the block's own method, then what is known of SpikingJelly.

    Returns:
        Branches made of the block's own submodules, and a remark, empty where they run as they do in the
        block; None for a module that isn't known to be a residual block.

    Raises:
        StaysStock: a residual block that can't be wrapped; the text says why.
        TypeError, ValueError: a matcher or a method gave something else than modules of the block.
    """
    said, sums = None if matcher is None else matcher(block), None
    if said is None and callable(method := getattr(block, _METHOD, None)):
        said = method()
    if said is not None:
        branches, remark = _said_branches(block, name, said), ""
    else:
        forward = _qualified(type(block).forward)
        sums = None if forward in _BLOCKS else sums_of(block)
        if forward not in _BLOCKS and sums is None:
            return None
        if "forward" in block.__dict__:
            raise StaysStock("its forward was replaced")
        if sums is None:
            parts, remark = _BLOCKS[forward](block)
            branches = [_branch(block, name, names, tokens, len(parts)) for names, tokens in parts]
        else:
            if not sums.fires_after and differs_on_a_sample(block, sums.branches):
                raise StaysStock(f"on a sample it is not {sums.expression}, of summands of one shape")
            branches, remark = _found_branches(name, sums)
    _check_nothing_else(block, branches, None if sums is None else sums.touched)
    return branches, remark, None if sums is None else sums.beside


def consecutive_lists(model: nn.Module) -> list[nn.Module]:
    """The module lists whose blocks run one after another: SpikingJelly's, and by their owners' graphs."""
    known = [
        getattr(owner, name)
        for owner in model.modules()
        for method in ("forward", "forward_features")
        for name in _LISTS.get(_qualified(getattr(type(owner), method, None)), ())
    ]
    seen = [
        blocks
        for owner in model.modules()
        for blocks in owner.children()
        if type(blocks) is nn.ModuleList and blocks not in known and calls_in_a_row(owner, blocks)
    ]
    return known + seen


def _qualified(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}".removeprefix(
        _ZOO
    )


def _branch(block: nn.Module, name: str, names: Parts, tokens: bool, count: int) -> Branch:
    label = name if count == 1 else f"{name}.{'..'.join(dict.fromkeys((names[0], names[-1])))}"
    return Branch([block.get_submodule(part) for part in names], label, tokens)


def _found_branches(name: str, sums: Sums) -> tuple[list[Branch], str]:
    several = len(sums.branches) > 1
    branches = [
        Branch([module], f"{name}: branch {index}" if several else name)
        for index, module in enumerate(sums.branches)
    ]
    return branches, f"{sums.expression}{f'; {FIRES_EARLY}' if sums.fires_after else ''}"


def _said_branches(block: nn.Module, name: str, said: Any) -> list[Branch]:
    modules = [said] if isinstance(said, nn.Module) else said
    if (
        not isinstance(modules, Sequence)
        or not modules
        or not all(isinstance(m, nn.Module) for m in modules)
    ):
        raise TypeError(
            f"{name} ({type(block).__name__}): a matcher or residual_branches gives a branch as a module, "
            f"several as a list, not {said!r}"
        )
    own = {id(parameter) for parameter in block.parameters()}
    for module in modules:
        for key, parameter in module.named_parameters():
            if id(parameter) not in own:
                raise ValueError(
                    f"{name} ({type(block).__name__}): the branch's parameter {key} is not the block's, so "
                    "no optimizer and no state_dict would know it. Build the branch of the block's modules."
                )
    if len(modules) == 1:
        return [Branch(modules, name)]
    return [Branch([module], f"{name}: branch {index}") for index, module in enumerate(modules)]


def _check_nothing_else(
    block: nn.Module, branches: Sequence[Branch], touched: frozenset[str] | None
) -> None:
    """``touched``: the parts that the forward runs, where that is known; published blocks have others too,
    a norm that nobody calls."""
    inside = {id(module) for branch in branches for module in branch.modules()}
    parameters = {id(parameter) for branch in branches for parameter in branch.parameters()}
    rest = [
        name for name, module in block.named_modules() if is_spiking(module) and id(module) not in inside
    ]
    rest += [name for name, parameter in block.named_parameters() if id(parameter) not in parameters]
    if touched is not None:
        rest = [name for name in rest if any(f"{name}.".startswith(f"{one}.") for one in touched)]
    if rest:
        raise StaysStock(f"it does more than add its branch: {', '.join(rest)} would be left out")
    for part, module in block.named_modules():
        if id(module) not in inside and any(getattr(module, hooks) for hooks in _HOOKS):
            raise StaysStock(
                f"{part or 'the block'} has hooks, and is not called when the block is wrapped"
            )


# SpikingJelly's blocks: their branches, each with whether it takes tokens, and a remark.

Found = tuple[list[tuple[Parts, bool]], str]
_BASIC = ("conv1", "bn1", "sn1", "conv2", "bn2", "sn2")
_BOTTLENECK = (*_BASIC, "conv3", "bn3", "sn3")
_MEMBRANE = ("spike1", "conv1", "bn1", "spike2", "conv2", "bn2")


def _check_shortcut(block: Any) -> None:
    if block.downsample is not None:
        raise StaysStock("its shortcut is not the identity: it changes the shape")


def _sew(parts: Parts) -> Callable[[Any], Found]:
    def found(block: Any) -> Found:
        _check_shortcut(block)
        if block.cnf != "ADD":
            raise StaysStock(
                f"connect function {block.cnf!r} multiplies the shortcut, which can't be undone"
            )
        return [(parts, False)], ""

    return found


def _residual(parts: Parts, remark: str = "") -> Callable[[Any], Found]:
    def found(block: Any) -> Found:
        _check_shortcut(block)
        return [(parts, False)], remark

    return found


def _attention_and_mlp(_block: Any) -> Found:
    return [(("attn",), True), (("mlp",), True)], ""


def _spatial_mlp(mlp: Any, prefix: str = "mlp.") -> list[tuple[Parts, bool]]:
    first, second = (tuple(f"{prefix}{name}{i}" for name in ("lif", "fc", "bn")) for i in (1, 2))
    return [(first, False), (second, False)] if mlp.residual else [((*first, *second), False)]


def _convolution_and_mlp(block: Any) -> Found:
    return [(("lif", "dwconv", "bn"), False), *_spatial_mlp(block.mlp)], ""


def _attention_and_spatial_mlp(block: Any) -> Found:
    return [(("attn",), True), *_spatial_mlp(block.mlp)], ""


def _spatial_mlp_alone(block: Any) -> Found:
    return _spatial_mlp(block, ""), ""


def _inseparable(_block: Any) -> Found:
    raise StaysStock("its attention adds the shortcut itself, and can't be run without")


_BLOCKS: dict[str, Callable[[Any], Found]] = {
    "sew_resnet.BasicBlock.forward": _sew(_BASIC),
    "sew_resnet.Bottleneck.forward": _sew(_BOTTLENECK),
    "spiking_resnet.BasicBlock.forward": _residual(_BASIC, FIRES_EARLY),
    "spiking_resnet.Bottleneck.forward": _residual(_BOTTLENECK, FIRES_EARLY),
    "ms_resnet._MSBlock.forward": _residual(_MEMBRANE),
    "ms_resnet._MaxResNetMaxBlock.forward": _residual((*_MEMBRANE[:3], "max_pool", *_MEMBRANE[3:])),
    "masnn._AttMSBlock.forward": _residual((*_MEMBRANE, "attention")),
    "spikformer.SpikformerBlock.forward": _attention_and_mlp,
    "qkformer._Block.forward": _attention_and_mlp,
    "maxformer._DWCBlock.forward": _convolution_and_mlp,
    "maxformer._SSABlock.forward": _attention_and_spatial_mlp,
    "maxformer._SpatialMLP.forward": _spatial_mlp_alone,
    "spike_driven_transformer._Block.forward": _inseparable,
}
_STAGES = ("stage1", "stage2", "stage3")
_LISTS: dict[str, Parts] = {
    "spikformer.Spikformer.forward_features": ("blocks",),
    "qkformer.QKFormer.forward": _STAGES,
    "maxformer.MaxFormer.forward": _STAGES,
    "spike_driven_transformer.SpikeDrivenTransformer.forward": ("blocks",),
}
