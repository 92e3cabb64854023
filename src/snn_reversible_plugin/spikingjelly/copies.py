"""The copies of SpikingJelly in a process: whichever release, under whatever name it was imported.

The one idea: a neuron says by its class's module which copy it is from, and the copy says how its release
computes. So nothing here is imported by name, several copies are told apart, and one that a repository has
bundled (``src.spikingjelly.clock_driven``) is a copy like the one that pip installed.

Source: the modules ``base``, ``neuron`` and ``surrogate`` of SpikingJelly 0.0.0.0.12 (``clock_driven``),
0.0.0.0.14 and 2.0 (``activation_based``), read side by side.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import spikingjelly_root
from snn_reversible_plugin.neurons.integrate_fire.reference import Order, Rule

_THREE = {"IF": "IFNode", "LIF": "LIFNode", "PLIF": "ParametricLIFNode"}


class Copy:
    """One copy of one release.

    Attributes:
        root: the package that its neurons are in, as it was imported.
        has_step_modes: a neuron can be told to run all time steps in one call; 0.0.0.0.12 has types for it.
        has_operators: multi-step neurons run in operators of the release's own (2.0).
        is_scripted: charges and resets are functions compiled by TorchScript (0.0.0.0.14).
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.base, self.neuron, self.surrogate = map(self._module, ("base", "neuron", "surrogate"))
        if not hasattr(self.neuron, "check_backend") and not hasattr(self.neuron.BaseNode, "store_v_seq"):
            raise ImportError(
                f"{root} is a release below 0.0.0.0.12; neurons of that, of 0.0.0.0.14 and of 2.0 become "
                "reversible: install one of these"
            )
        base = self.neuron.BaseNode
        # Users may put other types in their place.
        several = "" if hasattr(base, "step_mode") else "MultiStep"
        self._sequences = {key: getattr(self.neuron, several + name) for key, name in _THREE.items()}
        self.has_step_modes = hasattr(base, "step_mode")
        self.has_operators = hasattr(base, "functional_forward")
        self.is_scripted = isinstance(getattr(base, "jit_hard_reset", None), torch.jit.ScriptFunction)

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.root}.{name}")

    @functools.cached_property
    def default_surrogate(self) -> Any:
        """What a neuron fires by that was given none."""
        return self.surrogate.Sigmoid()

    def order(self, equations: str) -> Order:
        """In which order its neurons with these equations compute."""
        if self.has_operators:
            return Order()
        if not self.has_step_modes:
            return Order(
                v_reset_first=True, v_seq_last=True, scales=True, selects=True, cats=True, numbers=True
            )
        together = self.is_scripted
        return Order(
            v_reset_first=not together,
            reset_together=together,
            charge_together=together and equations == "LIF",
            scales=True,
            selects=True,
        )

    def run(
        self, equations: str, rule: Rule, surrogate: Any, x_seq: Tensor, v: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Spikes and final membrane of a sequence, by the release's own code. ``w`` is of a PLIF neuron."""
        if self.has_operators:
            operators, options = self._module("functional"), (surrogate, rule.detach_reset)
            settings = (rule.v_threshold, rule.v_reset, *options)
            if equations == "IF":
                return operators.if_multi_step(x_seq, v, *settings)[:2]  # type: ignore[no-any-return]
            if equations == "LIF":
                return operators.lif_multi_step(x_seq, v, rule.tau, rule.decay_input, *settings)[:2]  # type: ignore[no-any-return]
            return operators.plif_multi_step(x_seq, v, w, rule.decay_input, *settings)[:2]  # type: ignore[no-any-return]
        leak: dict[str, Any] = {} if equations == "IF" else {"decay_input": rule.decay_input}
        if equations == "LIF":
            leak["tau"] = rule.tau
        node = self._sequences[equations](
            v_threshold=rule.v_threshold, v_reset=rule.v_reset, surrogate_function=surrogate,
            detach_reset=rule.detach_reset, **leak,
        )  # fmt: skip
        if self.has_step_modes:
            node.step_mode = "m"
        if equations == "PLIF":
            node.w = torch.nn.Parameter(w, requires_grad=False)
        # TorchScript runs a function as it is written once, and in its own order from then on.
        for _ in range(4 if self.is_scripted else 1):
            node.v = v
            spikes = node(x_seq)
        return spikes, node.v


LOADED: list[Copy] = []


@functools.cache
def copy_at(root: str) -> Copy:
    """The copy whose neurons are in a package.

    Raises:
        ImportError: it is a release below 0.0.0.0.12.
    """
    copy = Copy(root)
    LOADED.append(copy)
    return copy


def copy_of(cls: type) -> Copy | None:
    """The copy that a class, or a class that it derives from, is from; None for any other."""
    for base in cls.__mro__:
        if root := spikingjelly_root(base):
            return copy_at(root)
    return None


class InTorch:
    """Context manager: inside, a neuron that is set to compute in cupy computes in torch.

    Of a release with ``backend="cupy"`` the torch code is the specification: cupy's kernels are compiled
    with fast math, and round otherwise.
    """

    __slots__ = ("_key", "_set_to", "_table")

    def __init__(self, module: nn.Module) -> None:
        self._table = module.__dict__
        self._key = "_backend" if "_backend" in self._table else "backend"
        self._set_to = self._table.get(self._key)

    def __enter__(self) -> None:
        if self._set_to == "cupy":
            self._table[self._key] = "torch"

    def __exit__(self, *exc: object) -> None:
        if self._set_to == "cupy":
            self._table[self._key] = self._set_to


def why_not_as_set(module: nn.Module) -> str:
    """What :class:`InTorch` does to a neuron, for reports; empty for most."""
    if getattr(module, "backend", "") != "cupy":
        return ""
    return 'its backend "cupy" is served by the equations of "torch"'


@functools.cache
def installed() -> Copy:
    """The copy that ``import spikingjelly`` gives, 2.0's or 0.0.0.0.14's neurons before older ones.

    Raises:
        ImportError: SpikingJelly is not installed.
    """
    for home in ("activation_based", "clock_driven"):
        try:
            return copy_at(f"spikingjelly.{home}")
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.partition(".")[0] != "spikingjelly":
                raise
    raise ImportError(
        "snn_reversible_plugin.spikingjelly needs SpikingJelly, which is not installed: "
        "pip install 'snn-reversible-plugin[spikingjelly]'"
    )
