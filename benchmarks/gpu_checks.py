"""What benchmarks/gpu.py holds every kernel to, in cases of a few kernels each, by family.

The one idea: to compile is what takes the time, so a case compiles as little as can be, and whoever asks
may ask for the first case of each family alone, or for as many as there is time for.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import snntorch
import torch
from spikingjelly.activation_based import neuron, surrogate

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.grid import decays
from snn_reversible_plugin.grid.step import Record, steps_on
from snn_reversible_plugin.grid.step import reference as steps_reference
from snn_reversible_plugin.neurons.integrate_fire import in_place, on_device, reference
from snn_reversible_plugin.neurons.surrogates import in_one_pass
from snn_reversible_plugin.ops import forms
from snn_reversible_plugin.ops.bits import reference as bits_reference
from snn_reversible_plugin.snntorch.surrogates import known_surrogate
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd


class Case(NamedTuple):
    """One comparison with a reference, of a family."""

    family: str
    name: str
    holds: Callable[[], bool]


NAMES = ("ATan", "Sigmoid", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf")
RESETS = (None, 0.0, -0.3)


def cases(device: torch.device, small: bool) -> dict[str, list[Case]]:
    """All cases, by family. Nothing runs yet.

    Args:
        device: where the kernels run.
        small: few neurons, for a CPU.
    """
    found: dict[str, list[Case]] = {}
    for of_family in (_forms, _bits, _steps, _one_pass, _orders, partial(_networks, small=small)):
        for case in of_family(device):
            found.setdefault(case.family, []).append(case)
    return found


def form_names(device: torch.device) -> dict[str, str]:
    """Which module computes each operation on a device."""
    found = {}
    for operation in (forms.BITS, forms.GRID_STEP, forms.SEQUENCE):
        form = forms.form_of(operation, device)
        name = "none here" if form is None else form.__name__.removeprefix("snn_reversible_plugin.")
        found[operation] = name
    return found


def _forms(device: torch.device) -> Iterator[Case]:
    for operation, form in form_names(device).items():
        there = device.type == "cpu" or form != "none here"
        yield Case("a form on this device", operation, lambda there=there: there)


def _bits(device: torch.device) -> Iterator[Case]:
    form: Any = forms.form_of(forms.BITS, device)

    def holds(dtype: torch.dtype, each: int) -> bool:
        for n in (1, 7, 1024, 100_003):
            flat = torch.randint(2**each, (n,), device=device).to(dtype)
            packed, out = form.pack_bits(flat, each), torch.zeros_like(flat)
            form.unpack_bits(packed, out, each)
            expected = bits_reference.pack_bits(flat, each)
            if not (torch.equal(packed, expected) and torch.equal(out, flat)):
                return False
        return True

    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64
    for each, dtype in itertools.product(range(1, 5), dtypes):
        if each == 1 or dtype is not torch.bool:
            yield Case("bits, every width and dtype", f"{each} of {dtype}", partial(holds, dtype, each))


def _steps(device: torch.device) -> Iterator[Case]:
    form, scale, n = steps_on(device), 2.0**16, 4099

    def there_and_back(reset: str, beta: float, gain: float | None) -> bool:
        u = (torch.randn(n, device=device) * scale).round().div(scale)
        x, theta = torch.randn(n, device=device), 0.75
        step = decays.Step(decays.decay_of(beta, beta, beta, "check"), theta * scale, reset, scale, gain)
        spikes, out, expected = (torch.empty_like(u) for _ in range(3))
        bits = None if reset == decays.NONE else form.fire(u, theta, False, spikes)
        of_reference = None if bits is None else steps_reference.fire(u, theta, False, spikes)
        pieces, _, _ = form.charge(u, x, bits, step, Record(), out)
        steps_reference.charge(u, x, of_reference, step, None, expected)
        pieces = [torch.as_tensor(piece) for piece in pieces]
        record = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)
        back = form.undo(out, x, bits, step, record.numpy() if device.type == "cpu" else record)
        return torch.equal(out, expected) and torch.equal(back, u)

    for reset in (decays.NONE, decays.SUBTRACT, decays.BEFORE, decays.AFTER):
        for beta, gain in itertools.product((0.9, 1.0, 0.5, 1 / 3), (None, 0.5)):
            holds = partial(there_and_back, reset, float(torch.tensor(beta)), gain)
            yield Case(f"steps on the grid, reset: {reset}", f"decay {beta:.2f}, gain {gain}", holds)


def _one_pass(device: torch.device) -> Iterator[Case]:
    known = [as_autograd(getattr(surrogate, name)()) for name in NAMES]
    of_snntorch = "atan", "fast_sigmoid", "sigmoid"
    known += [known_surrogate(getattr(snntorch.surrogate, name)()) for name in of_snntorch]

    def holds(one: Any) -> bool:
        # A formula is compiled only where it gives the bits of torch's; a CPU has forms for some.
        return in_one_pass(one, device) is not None or device.type == "cpu"

    for one in known:
        yield Case("surrogates in one pass", str(one.name), partial(holds, one))


def _orders(device: torch.device) -> Iterator[Case]:
    """Sequences in the orders of SpikingJelly's older releases, to the formulas."""
    Order = reference.Order
    orders = {
        "0.0.0.0.12": Order(
            v_reset_first=True, v_seq_last=True, scales=True, selects=True, cats=True, numbers=True
        ),
        "0.0.0.0.14": Order(reset_together=True, charge_together=True, scales=True, selects=True),
        "0.0.0.0.14, ParametricLIF": Order(reset_together=True, scales=True, selects=True),
    }

    def holds(order: Any, learns: bool, name: str, v_reset: Any, how: tuple[bool, bool, bool]) -> bool:
        x, v, *gradients = torch.randn(4, 5, 1031, device=device).unbind(0)
        wanted, (decay_input, detach, starts) = reference.Wanted(x=True, v=True, q=True), how
        rule = reference.Rule(None if learns else 1.7, decay_input, 0.8, v_reset, detach, order)
        q = torch.tensor(0.37, device=device) if learns else None
        plain = reference.Neuron(rule, as_autograd(getattr(surrogate, name)()), q)
        form = plain._replace(launched=on_device.takes(plain, device))
        start: Any = v[0] if starts else rule.rest
        given = reference.OutputGradients(gradients[0], gradients[1][0], gradients[1])
        theirs = reference.sequence(x, start, plain, True)
        there = in_place.multi_step(x, start, form, True)
        back = in_place.multi_step_vjp(x, start, given, form, wanted)
        expected = reference.sequence_vjp(x, start, given, plain, wanted)
        pairs = [*zip(there, theirs, strict=True), (back.x, expected.x)]
        pairs += [*zip(back.v, expected.v, strict=True), *zip(back.q, expected.q, strict=True)]
        return all(a is b or torch.equal(a, b) for a, b in pairs)

    for version, order in orders.items():
        for number, name in enumerate(NAMES):
            for v_reset in RESETS:
                for how in ((True, False, True), (False, number % 2 == 0, False)):
                    yield Case(
                        f"sequences in the order of {version}",
                        f"{name}, v_reset={v_reset}, decay_input={how[0]}, detach_reset={how[1]}",
                        partial(holds, order, "P" in version, name, v_reset, how),
                    )


def _networks(device: torch.device, small: bool) -> Iterator[Case]:
    """Converted neurons and loops to stock's own operators, and to autograd on the grid, on this device."""

    def outcome(node: Any, x: torch.Tensor) -> list[torch.Tensor]:
        node.reset()
        x = x.detach().requires_grad_()
        spikes = node(x) if node.step_mode == "m" else torch.stack([node(one) for one in x])
        weights = torch.linspace(-1, 1, spikes.numel(), device=x.device).view(spikes.shape)
        ((spikes * weights).sum() + node.v.square().sum()).backward()
        assert x.grad is not None
        gradients = [p.grad.clone() for p in node.parameters() if p.grad is not None]
        node.zero_grad()
        return [spikes.detach(), node.v.detach(), x.grad, *gradients]

    def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def currents() -> torch.Tensor:
        return torch.randn(5, 3, 67 if small else 1031, device=device).mul(1.5).add(0.4)

    def sequences(cls: Any, name: str, v_reset: Any, detach: bool) -> bool:
        function, x_seq = getattr(surrogate, name)(), currents()
        stock = cls(v_reset=v_reset, detach_reset=detach, step_mode="m", surrogate_function=function)
        stock = stock.to(device)
        ours = srp.convert_to_reversible(copy.deepcopy(stock))
        layouts = x_seq, x_seq.transpose(1, 2).contiguous().transpose(1, 2)
        same = all(equal(outcome(ours, layout), outcome(stock, layout)) for layout in layouts)
        assert ours.treatment in ("analytic", "generic replay"), ours.treatment
        return same

    def loops(cls: Any, name: str, v_reset: Any) -> bool:
        function, x_seq = getattr(surrogate, name)(), currents()
        node = cls(v_reset=v_reset, step_mode="s", surrogate_function=function).to(device)
        srp.convert_to_reversible(node)
        with srp.reversible(node):
            ours = outcome(node, x_seq)
        with differentiated(node):
            theirs = outcome(node, x_seq)
        return equal(ours, theirs)

    for cls in (neuron.LIFNode, neuron.IFNode, neuron.ParametricLIFNode):
        for v_reset, detach, name in itertools.product(RESETS, (False, True), NAMES):
            yield Case(
                f"sequences to stock's operators: {cls.__name__}",
                f"{name}, v_reset={v_reset}, detach_reset={detach}",
                partial(sequences, cls, name, v_reset, detach),
            )
        for number, name in enumerate(NAMES):
            v_reset = RESETS[number % 3]
            holds = partial(loops, cls, name, v_reset)
            family = f"loops on the grid to autograd: {cls.__name__}"
            yield Case(family, f"{name}, v_reset={v_reset}", holds)
