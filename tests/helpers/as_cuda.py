"""The CPU told to be a GPU: forms for CUDA compute on it, interpreted, and nobody may look at its values.

Whatever the package decides by a device it decides here as on CUDA, and SpikingJelly's own kernels run too,
with the very launches that they have there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spikingjelly._ops import if_, lif, plif
from spikingjelly._ops.if_ import triton as if_kernels
from spikingjelly._ops.lif import triton as lif_kernels
from spikingjelly._ops.plif import triton as plif_kernels

from snn_reversible_plugin.neurons import surrogates
from snn_reversible_plugin.neurons.integrate_fire import on_triton
from snn_reversible_plugin.neurons.surrogates import in_one_pass
from snn_reversible_plugin.ops import devices, forms
from snn_reversible_plugin.spikingjelly import agreement


class _Torch:
    """torch, for a module that asks for a GPU before it launches."""

    cuda = SimpleNamespace(device=lambda _: nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _check(condition: bool, message: Any = None) -> None:
        assert condition or "requires CUDA" in message(), message


def _operator(kernels: Any, inputs: int, of_backward: Any) -> Any:
    """Stock's operator, with the autograd that it registers; ``inputs``: how many of its arguments are."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            spikes, v, h = kernels._forward_impl(*args)
            ctx.save_for_backward(h, *args[:inputs])
            ctx.settings, ctx.store = args[inputs:], args[-2]
            ctx.mark_non_differentiable(h)
            ctx.set_materialize_grads(False)
            return spikes, v, h

        @staticmethod
        def backward(ctx: Any, gs: Any, gv: Any, _: Any) -> Any:
            h, *given = ctx.saved_tensors
            gs = torch.zeros_like(h, dtype=given[0].dtype) if gs is None else gs
            gv = torch.zeros_like(h if ctx.store else h[0]) if gv is None else gv
            found = kernels._backward_impl(gs, gv, *of_backward(given), h, *ctx.settings)
            return (*found, *(None for _ in ctx.settings))

    return Operator.apply


@contextmanager
def as_cuda(device: str = "cpu") -> Iterator[None]:
    """Inside, a type of device is one that the host would wait for, with the forms and kernels of CUDA.

    ``"cpu"`` computes, where Triton interprets. ``"meta"`` has no values, so that nobody can look at one:
    kernels of ours are no more than counted, and what waits for a sample is taken as proved.
    """

    def first(operation: str, asked: str) -> Any:
        return next(forms.forms_of(operation, "cuda" if asked == device else asked), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "HOSTS", frozenset())
        patch.setattr(forms, "_first", first)
        patch.setattr(agreement, "_chosen", lambda *_: "triton")
        _forget()
        if device == "meta":
            patch.setattr(agreement, "agree", lambda *_: True)
            patch.setattr(surrogates, "agree", lambda *_: True)
            patch.setattr(on_triton, "divides", lambda _: False)
        for module, kernels, inputs, of_backward in (
            (if_, if_kernels, 2, lambda _: ()),
            (lif, lif_kernels, 2, lambda _: ()),
            (plif, plif_kernels, 3, lambda given: given),
        ):
            patch.setattr(kernels, "torch", _Torch())
            if device == "cpu":
                patch.setattr(module, "_forward", _operator(kernels, inputs, of_backward))
        yield
    _forget()


def _forget() -> None:
    """What was found out on another device."""
    forms.form_of.cache_clear()
    agreement.agrees.cache_clear()
    in_one_pass.cache_clear()
