"""``convert_to_reversible``: one call that makes a stock network record its training on the tape.

The one idea: swap classes, never modules. The root's class gets a subclass whose calls run under a
tape, each spiking neuron's class becomes its reversible counterpart from the registry. Module identity,
parameters, hooks, optimizers and ``state_dict`` stay as they were, and ``restore`` puts the classes back.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from snn_reversible_plugin.blocks.streams_on_grid import OnGrid, carries_a_membrane
from snn_reversible_plugin.blocks.surgery import wrap_by_conversion
from snn_reversible_plugin.blocks.wrapped import run_plainly, wrapped_chains
from snn_reversible_plugin.modules.checks import bytes_of, check_model, skipped_modules
from snn_reversible_plugin.modules.flat import make_flat
from snn_reversible_plugin.modules.kinds import is_spiking, load_adapters, own_neuron_types
from snn_reversible_plugin.modules.last_use import tell_last_uses, tell_no_more
from snn_reversible_plugin.modules.registry import StaysStock, reversible_type, type_on_grid
from snn_reversible_plugin.modules.states import stored_buffers
from snn_reversible_plugin.modules.swap import (
    FUSED,
    NAME,
    ON_GRID,
    SETTINGS,
    STRICT,
    SwappedClass,
    stock_classes,
    swap,
    swapped_class,
    unswap,
)
from snn_reversible_plugin.modules.tracking import tracked
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.own.call import own_neurons
from snn_reversible_plugin.neurons.own.left import let_go
from snn_reversible_plugin.tape import between, hand_over, suspended
from snn_reversible_plugin.tape.final_membrane import compute_all
from snn_reversible_plugin.tape.settings import Settings, settings_for

M = TypeVar("M", bound=nn.Module)
_used: weakref.WeakKeyDictionary[nn.Module, dict[Any, Settings]] = weakref.WeakKeyDictionary()
ARITHMETICS = ("auto", "fused", "grid", "stock")


class Recorded(SwappedClass):
    """Root of a converted model: its calls run under a tape."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock_forward = super().forward  # type: ignore[misc]

        @functools.wraps(stock_forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or switches.by_autograd():
                return stock_forward(self, *args, **kwargs)
            with settings_of(self).recording():
                return stock_forward(self, *args, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Compiled after the conversion: the compiler sees the stock network.
        compiled = torch.compiler.is_compiling() or getattr(self, "_compiled_call_impl", None) is not None
        if compiled or switches.by_autograd():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with settings_of(self).recording():  # type: ignore[arg-type]
            result = super().__call__(*args, **kwargs)  # type: ignore[misc]
            if _buffers_are_broadcast():
                hand_over(stored_buffers(self))  # type: ignore[arg-type]
        return let_go(self, result)  # type: ignore[arg-type]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        compute_all()  # final membranes are of the weights before
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]


def _buffers_are_broadcast() -> bool:
    """Whether the caller is a DistributedDataParallel that overwrites the buffers before its next call:
    past their version counters, and membranes may be among them.
    """
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return wrapper is not None and bool(wrapper.will_sync_module_buffers())


class Skipped(SwappedClass):
    """A module named in ``skip``: what autograd saves inside it is kept as it is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with suspended():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def convert_to_reversible(
    model: M,
    *,
    mode: str = "memory",
    arithmetic: str = "auto",
    skip: Sequence[str | type[nn.Module]] = (),
    blocks: bool = False,
    budget: int | str | None = None,
) -> M:
    """Make a spiking network train in a small part of its memory.

    In place: returns the same object, with the same parameters and the same ``state_dict``. Training
    scripts, optimizers made before, hooks, references to submodules, ``copy.deepcopy``, pickling and
    ``torch.save`` keep working. In stock arithmetic outputs and gradients are bit-identical to the stock
    network's; :func:`verify` says which arithmetic each neuron runs, and how far the grid is from stock.
    Calling it again changes the settings. See :func:`restore`, :func:`memory_report`, :func:`verify`.

    Args:
        model: any ``nn.Module``. SpikingJelly's and snnTorch's neurons, and those that
            :func:`register_reversible` was told of, become reversible; all else is recorded, a network with
            neurons of your own too, which warns once.
        mode: ``"memory"`` rebuilds in the backward everything that can be rebuilt, ``"speed"`` only what
            needs no convolution or matrix product. ``"auto"`` has the peak of ``"memory"``, and keeps
            results of convolutions and matrix products where that peak leaves room; the first step of a
            shape, and a network that is called several times before a backward, run as ``"memory"``.
            ``"minimal"`` rebuilds and differentiates the largest layers a slice of the batch at a time: the
            least peak, outputs of ``"memory"``, gradients equal to rounding, more time.
        arithmetic: ``"stock"``: outputs and gradients are stock's bit for bit. ``"auto"``: neurons stepped
            one time step at a time compute on multiples of 2^-16, which makes them reversible in time: they
            hold a spike bit and a fraction of a bit a step, and the gradient is the exact one of that
            forward; all else is stock's. ``"grid"``: so do the residual streams of MS-ResNet and its kind,
            which are then undone from block to block. ``"fused"``: as ``"auto"``, and SpikingJelly's
            multi-step IF, LIF and ParametricLIF nodes keep float32 membranes where float16 or bfloat16
            comes in: stock's float32 code between two casts, of each release's own, on a GPU one launch
            instead of stock's unfused code. Spikes differ where stock's half-precision membranes round.
        skip: names (as in ``named_modules``) or types of modules to leave as they are: their neurons stay
            stock and nothing that runs inside them is replayed.
        blocks: also turn chains of residual blocks into reversible ones, as :func:`wrap_residual_blocks`
            does. This changes the function that the network computes, where nothing else does.
        budget: bytes for a whole training step, ``10 << 30`` or ``"10GiB"``: parameters, gradients and
            inputs included, on a GPU all that is allocated. As ``"auto"``, but as much is kept as fits, by
            what the first step of a shape took, which is measured. Nothing else changes.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or is compiled or scripted.
        ValueError: an unknown ``mode`` or ``arithmetic``, a ``skip`` name that is not in the model,
            ``"grid"`` where nothing can run on the grid, ``"fused"`` where nothing is fused, ``blocks``
            without residual blocks, a budget that is no number of bytes, or one together with ``"speed"``
            or ``"minimal"``.
        RuntimeError: from the first or second forward of a shape that the budget can't take.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = nn.Sequential(layer.Conv2d(2, 8, 3), neuron.LIFNode(step_mode="m"))
        >>> srp.convert_to_reversible(model) is model
        True
    """
    check_model(model, instead="srp.compile")
    settings = settings_for(mode, None if budget is None else bytes_of(budget), arithmetic)
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {ARITHMETICS}, not {arithmetic!r}")
    skipped = skipped_modules(model, skip)
    within_skipped = {id(inner) for top in skipped for inner in top.modules()}
    load_adapters()
    restore(model)
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in model.named_modules():
        target, spiking = None, is_spiking(module)
        if id(module) in within_skipped:
            reason = "named in skip"
        else:
            reason = f"the converter does not know {type(module).__name__}"
            try:
                target = reversible_type(module)
            except StaysStock as refusal:
                reason, spiking = str(refusal), True
        if target is not None:
            swaps.append((module, target))
        elif spiking:
            settings.stays_stock[name] = reason
    if not (swaps or settings.stays_stock):
        warnings.warn(
            f"{type(model).__name__} has no spiking neuron that the converter knows (SpikingJelly's and "
            f"snnTorch's). Its own{own_neuron_types(model)} are recorded as they are; what is computed "
            "from spikes is replayed, see memory_report. register_reversible teaches it a neuron.",
            stacklevel=2,
        )
    if blocks and not (surgery := wrap_by_conversion(model, skip)).chains:
        reasons = ", ".join(f"{block.name}: {block.why}" for block in surgery.blocks)
        warnings.warn(f"blocks=True, and no block can be wrapped ({reasons})", stacklevel=2)
    for module, target in swaps + own_neurons(model, within_skipped):
        if target is not type(module):
            swap(module, target)
    if arithmetic != "stock":
        names = {id(module): name for name, module in model.named_modules()}
        for module, _ in swaps:
            if not is_on_grid(module):
                _put_on_grid(module, names[id(module)], settings)
    if arithmetic == "grid":
        streams = _put_streams_on_grid(model, within_skipped)
        if not streams and len(settings.off_grid) == len(swaps):
            restore(model)
            raise ValueError(
                'arithmetic="grid": no neuron of the model can run on the grid, no residual stream needs '
                f"it. {_reasons(settings.off_grid)}"
            )
    if arithmetic == "fused" and not _fuse(module for module, _ in swaps):
        restore(model)
        raise ValueError(
            'arithmetic="fused": no neuron of the model is fused; IFNode, LIFNode and ParametricLIFNode of '
            'SpikingJelly are, in 0.0.0.0.12 MultiStepIFNode and so on. Use arithmetic="auto".'
        )
    if mode == "minimal":
        make_flat(recorded := [one for one in model.modules() if id(one) not in within_skipped])
        tell_last_uses(recorded, between)
    for module in skipped:
        swap(module, swapped_class(Skipped, type(module)))
    swap(model, swapped_class(Recorded, type(model)))
    SETTINGS.set(model, settings)
    return model


def _reasons(off_grid: dict[str, str]) -> str:
    """Each reason once, with the first of the modules that it holds for."""
    names: dict[str, list[str]] = {}
    for name, why in off_grid.items():
        names.setdefault(why, []).append(name or "the model")
    more = {why: f" and {len(others)} more" if others else "" for why, (_, *others) in names.items()}
    return "; ".join(f"{first}{more[why]}: {why}" for why, (first, *_) in names.items())


def _fuse(modules: Iterable[nn.Module]) -> int:
    """Mark those that can have float32 membranes whatever comes in; how many."""
    for module in (fused := [module for module in modules if getattr(module, "may_fuse", False)]):
        FUSED.set(module, True)
    return len(fused)


def _put_streams_on_grid(model: nn.Module, skipped: set[int]) -> int:
    wrapped = {id(block) for chain in wrapped_chains(model) for block in chain.blocks}
    blocks = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in skipped | wrapped and carries_a_membrane(module)
    }
    for name, module in blocks.items():
        swap(module, swapped_class(OnGrid, type(module)))
        NAME.set(module, name)
    return len(blocks)


def _put_on_grid(module: nn.Module, name: str, settings: Settings) -> None:
    target, why = None, "its equations are not written for the grid"
    try:
        target = type_on_grid(module)
    except StaysStock as refusal:
        why = str(refusal)
    if target is None:
        settings.off_grid[name] = why
        return
    swap(module, target)
    NAME.set(module, name)
    module.fix_grid()  # type: ignore[operator]
    if settings.arithmetic == "grid":
        STRICT.set(module, True)


def restore(model: M) -> M:
    """Make the network stock again, in place. A model that was never converted is returned as it is.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> from spikingjelly.activation_based import neuron
        >>> node = srp.restore(srp.convert_to_reversible(neuron.LIFNode()))
        >>> type(node) is neuron.LIFNode
        True
    """
    for module in model.modules():
        unswap(module)
        tell_no_more(module)
        for attribute in (SETTINGS, NAME, ON_GRID, STRICT, FUSED):
            attribute.clear(module)
    for chain in wrapped_chains(model):
        if chain.by_conversion:
            chain.remove()
    return model


@contextmanager
def reversible(
    model: nn.Module, *, mode: str | None = None, check: bool = False, budget: int | str | None = None
) -> Iterator[None]:
    """Context manager: the tape alone, for a loop that calls submodules itself.

    What runs inside is recorded, whichever module runs it; on a model that was not converted too.

    Args:
        model: named in errors; its settings give the default of ``mode``.
        mode: as in :func:`convert_to_reversible`.
        check: compare every rebuilt tensor with a checksum that the forward left, and name the module
            whose replay differs. Slow; waits for the device.
        budget: as in :func:`convert_to_reversible`.

    Raises:
        ValueError: an unknown mode, or a budget that is no number of bytes.
        RuntimeError: from the backward, in check mode, where a replay differs.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> model = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)])
        >>> with srp.reversible(model):
        ...     spikes = (model[0](torch.ones(4, 8)) > 0).float()
        ...     loss = model[1](spikes).sum()
        >>> loss.backward()
    """
    check_model(model, instead="srp.compile")
    with _settings_here(model, mode, budget).recording(check=check) as tape:
        if not check or tape is None:
            yield
            return
        with tracked(model, tape):
            yield


def _settings_here(model: nn.Module, mode: str | None, budget: int | str | None) -> Settings:
    """The settings of a model, or of this mode and budget, whose plans last from one use to the next."""
    settings = settings_of(model)
    if budget is None and mode in (None, settings.mode):
        return settings
    used, key = _used.setdefault(model, {}), (mode, budget)
    if key not in used:
        used[key] = settings_for(mode or "auto", None if budget is None else bytes_of(budget))
    return used[key]


@contextmanager
def stock(model: nn.Module) -> Iterator[None]:
    """Context manager: run a converted model the stock way.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from spikingjelly.activation_based import neuron
        >>> node = srp.convert_to_reversible(neuron.LIFNode())
        >>> with srp.stock(node):
        ...     print(type(node).__name__)
        LIFNode
    """
    with stock_classes(model.modules()), run_plainly(model):
        yield


@contextmanager
def differentiated(model: nn.Module) -> Iterator[None]:
    """Context manager: run a converted model in its own arithmetic, stock where that is stock, by autograd.

    What neurons on the grid, and fused ones, compute there is the specification of what they compute on the
    tape.
    """
    others = [
        module
        for module in model.modules()
        if module is not model
        and not (getattr(module, "is_set_for_grid", is_on_grid(module)) or FUSED.of(module))
    ]
    with stock_classes(others), switches.autograd():
        yield


def is_on_grid(module: nn.Module) -> bool:
    """Whether a neuron, as it is set now, runs on the grid."""
    return getattr(module, "arithmetic", None) == "grid"


def has_arithmetic_of_its_own(module: nn.Module) -> bool:
    """Whether a neuron, as it ran last, computes something else than stock: on the grid, or fused."""
    return is_on_grid(module) or getattr(module, "arithmetic", None) == "fused"


def grid_bits(module: nn.Module) -> int | None:
    """Binary digits behind the point of the grid that a neuron runs on, k; None where it runs on none."""
    return getattr(module, "bits_in_use", None) if is_on_grid(module) else None


def off_grid_reason(name: str, module: nn.Module, settings: Settings) -> str:
    """Why a neuron of a model is off the grid, since the conversion or now; empty where it isn't."""
    now: str = getattr(module, "off_grid_reason", "")
    return settings.off_grid.get(name, now)


def settings_of(model: nn.Module) -> Settings:
    """The settings of a converted model; the defaults for any other."""
    return SETTINGS.of(model) or Settings()
