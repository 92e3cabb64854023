"""SpikingJelly's other neurons, and a user's subclasses, against stock; names, copies, what stays stock."""

import copy
import itertools
import pickle

import pytest
import torch

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.registry import StaysStock, reversible_type
from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.spikingjelly import register
from spikingjelly_against_stock import (
    LOSSES,
    REV,
    Triangle,
    channels_last,
    check,
    converted,
    current,
    everything,
    make,
    packs,
    same,
)

# -- names, classes, pickles ---------------------------------------------------------------------------


def test_names():
    register()
    for stock, rev in REV.items():
        assert getattr(neuron, f"Rev{stock.__name__}") is rev
        node = rev()
        assert isinstance(node, stock)
        assert reversible_type(node) is rev
        assert (node.treatment, node.arithmetic) == ("analytic", "stock")


class Plain(neuron.LIFNode):
    """The dynamics of LIF, with something of its own beside."""

    def __init__(self, note, **settings):
        super().__init__(**settings)
        self.note = note


class Doubled(neuron.LIFNode):
    """Its own dynamics, learnable, stepwise."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gain = nn.Parameter(torch.tensor(1.7))

    def single_step_functional_forward(self, inputs, states, **kwargs):
        v = states[0] * 0.5 + inputs[0] * self.gain * self.gain
        s = self.surrogate_function(v - self.v_threshold)
        return (s,), (v - s * self.v_threshold * self.gain,)

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        return base.MemoryModule.multi_step_functional_forward(self, inputs, states, **kwargs)


class Counting(neuron.LIFNode):
    """Counts its calls, and writes to a buffer of its own in place."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls, self.log = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def single_step_functional_forward(self, inputs, states, **kwargs):
        self.calls += 1
        self.log.append(self.calls)
        self.seen += 1
        v = states[0] * 0.5 + inputs[0] * self.seen.item()
        return (self.surrogate_function(v - 1.0) * 2,), (v * v,)

    multi_step_functional_forward = Doubled.multi_step_functional_forward


class Traced(neuron.SimpleBaseNode):
    """A user's SimpleBaseNode, with a second state."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_memory("trace", 0.0)

    def neuronal_charge(self, x):
        self.trace = self.trace * 0.8 + x
        self.v = self.v * 0.5 + self.trace * x


class InPlace(neuron.SimpleIFNode):
    """Writes to its state in place, which autograd allows here."""

    def neuronal_charge(self, x):
        if isinstance(self.v, float):
            self.v = torch.zeros_like(x)
        self.v += x


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("stock", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode])
def test_a_state_that_a_subclass_added(stock, mode):
    """Stock's function of all time steps knows nothing of it."""

    class Beside(stock):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.register_memory("spikes", 0.0)

    node = Beside(step_mode=mode)
    check(node, current(4, 2, 3), calls=2, taped=(False, True))
    functional.reset_net(node)
    check(node, current(4, 2, 3), taped=(False, True))


@pytest.mark.parametrize("mode", ["m", "s"])
def test_subclasses_of_a_user(mode):
    rev = check(make(lambda **s: Plain("n", **s), mode=mode), current(4, 2, 3), taped=(True,))
    assert rev.treatment == "analytic"
    assert rev.note == "n"
    with tape.recording():
        assert packs(rev(current(4, 2, 3)) if mode == "m" else rev(current(2, 3)))
    v = torch.rand(2, 3, requires_grad=True)
    rev = check(make(Doubled, mode=mode), current(4, 2, 3), v, calls=2, taped=(False, True))
    assert rev.treatment == "generic replay"
    with tape.recording():
        assert packs(rev(current(4, 2, 3)) if mode == "m" else rev(current(2, 3)))
    rev = check(make(Counting, mode=mode), current(4, 2, 3), taped=(False, True))
    assert rev.log == list(range(1, rev.calls + 1))
    for cls in (Traced, InPlace):
        node = cls(v_threshold=0.7, v_reset=0.0, step_mode=mode)
        check(node, current(4, 2, 3), calls=2, taped=(False, True))


def test_a_forward_of_a_users_own_stays_stock():
    class Odd(neuron.BaseNode):
        def forward(self, x_seq):
            return self.surrogate_function(x_seq - self.v_threshold)

    with pytest.raises(StaysStock, match="a forward of its own"):
        reversible_type(Odd())
    node = Doubled()
    node.norm = nn.BatchNorm1d(3)
    with pytest.raises(StaysStock, match="batch-norm"):
        reversible_type(node)


def test_copies_and_pickles(tmp_path):
    x = current(4, 2, 3)
    for node in (make(neuron.LIFNode), neuron.QIFNode(step_mode="m"), make(lambda **s: Plain(1, **s))):
        rev = converted(node)
        for twin in (copy.deepcopy(rev), pickle.loads(pickle.dumps(rev))):
            assert type(twin) is type(rev)
            assert all(map(same, *(everything(n, x) for n in (node, twin))))
        torch.save(rev, tmp_path / "node.pt")
        twin = torch.load(tmp_path / "node.pt", weights_only=False)
        assert type(twin) is type(rev)


def test_through_the_converter():
    def network():
        torch.manual_seed(5)
        return nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1, step_mode="m"), layer.BatchNorm2d(4, step_mode="m"),
            neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"),
            layer.Conv2d(4, 4, 3, padding=1, step_mode="m"), layer.BatchNorm2d(4, step_mode="m"),
            neuron.ParametricLIFNode(surrogate_function=Triangle(), step_mode="m"),
            layer.Conv2d(4, 4, 3, padding=1, step_mode="m"),
            neuron.QIFNode(step_mode="m"),
            layer.Conv2d(4, 4, 3, padding=1, step_mode="m"),
            neuron.KLIFNode(scale_reset=True, step_mode="m"),
        )  # fmt: skip

    results = []
    for model in (network(), srp.convert_to_reversible(network())):
        torch.manual_seed(6)
        x = torch.rand(4, 3, 2, 6, 6).requires_grad_()
        out = model(x)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(map(same, *results))


# -- all the others ------------------------------------------------------------------------------------

TABLE = neuron.FewSpikeTable([0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125])


def flex_core(x, v):
    v = v * 0.5 + x
    s = surrogate.Sigmoid()(v - 0.5)
    return s, v * (1 - s)


MADE = {
    "GatedLIFNode": lambda: neuron.GatedLIFNode(T=4, inplane=3),
    "LIAFNode": lambda: neuron.LIAFNode(torch.tanh, True, step_mode="m"),
    "SimpleLIFNode": lambda: neuron.SimpleLIFNode(tau=2.0, decay_input=True, step_mode="m"),
    "ActivationAwareIFNode": lambda: neuron.ActivationAwareIFNode(torch.tensor([0.5, 1.0, 0.7]),
                                                                  channel_dim=1, step_mode="m"),
    "CUBALIFNode": lambda: functional.set_step_mode(node := neuron.CUBALIFNode(), "m") or node,
    "PSN": lambda: neuron.PSN(T=4),
    "MaskedPSN": lambda: neuron.MaskedPSN(k=2, T=4, lambda_init=1.0, step_mode="m"),
    "SlidingPSN": lambda: neuron.SlidingPSN(k=2, step_mode="m"),
    "DSRIFNode": lambda: neuron.DSRIFNode(T=4),
    "DSRLIFNode": lambda: neuron.DSRLIFNode(T=4),
    "FewSpikeNode": lambda: neuron.FewSpikeNode(TABLE, step_mode="s"),
    "OutlierAwareThresholdNode": lambda: neuron.OutlierAwareThresholdNode(TABLE, TABLE, 1.0),
    "HGNode": lambda: neuron.HGNode([TABLE, TABLE], [0.3]),
    "STBIFNode": lambda: neuron.STBIFNode(0.5, 4),
    "FlexSN": lambda: neuron.FlexSN(flex_core, num_states=1),
    "MPBNBaseNode": lambda: neuron.MPBNBaseNode(out_channels=3),
    "MPBNLIFNode": lambda: neuron.MPBNLIFNode(out_channels=3, step_mode="m"),
    "ILCBaseNode": lambda: neuron.ILCBaseNode(2, 3),
    "ILCIFNode": lambda: neuron.ILCIFNode(2, 3),
    "ILCLIFNode": lambda: neuron.ILCLIFNode(2, 3),
    "ILCCUBALIFNode": lambda: neuron.ILCCUBALIFNode(2, 3),
    "NoisyBaseNode": lambda: neuron.NoisyBaseNode(6),
    "NoisyCUBALIFNode": lambda: neuron.NoisyCUBALIFNode(6),
    "NoisyILCBaseNode": lambda: neuron.NoisyILCBaseNode(2, 3),
    "NoisyILCCUBALIFNode": lambda: neuron.NoisyILCCUBALIFNode(2, 3),
    "NoisyNonSpikingBaseNode": lambda: neuron.NoisyNonSpikingBaseNode(6),
    "NoisyNonSpikingIFNode": lambda: neuron.NoisyNonSpikingIFNode(6),
    "NonSpikingBaseNode": neuron.NonSpikingBaseNode,
    "NonSpikingIFNode": neuron.NonSpikingIFNode,
    "NonSpikingLIFNode": neuron.NonSpikingLIFNode,
    "OTTTLIFNode": neuron.OTTTLIFNode,
    "SLTTLIFNode": neuron.SLTTLIFNode,
}  # fmt: skip
ALL = sorted(
    {
        name
        for name in dir(neuron)
        if isinstance(getattr(neuron, name), type)
        and issubclass(getattr(neuron, name), nn.Module)
        and not name.startswith("Rev")
    }
)
STAYS_STOCK = {
    "DSRIFNode": "its own backward needs its input only",
    "DSRLIFNode": "its own backward needs its input only",
    "ILCBaseNode": "writes into its input",
    "ILCCUBALIFNode": "writes into its input",
    "ILCIFNode": "writes into its input",
    "ILCLIFNode": "writes into its input",
    "MPBNBaseNode": "batch-norm statistics",
    "MPBNLIFNode": "batch-norm statistics",
    "NoisyBaseNode": "sequence of noise",
    "NoisyCUBALIFNode": "sequence of noise",
    "NoisyILCBaseNode": "sequence of noise",
    "NoisyILCCUBALIFNode": "sequence of noise",
    "NoisyNonSpikingBaseNode": "sequence of noise",
    "NoisyNonSpikingIFNode": "sequence of noise",
    "NonSpikingBaseNode": "linear",
    "NonSpikingIFNode": "linear",
    "NonSpikingLIFNode": "linear",
    "STBIFNode": "inference",
}
ABSTRACT = {"BaseNode", "SimpleBaseNode", "AdaptBaseNode"}
ONE_MODE = {"GatedLIFNode": "m", "PSN": "m", "OTTTLIFNode": "s", "SLTTLIFNode": "s", "FewSpikeNode": None,
            "OutlierAwareThresholdNode": None, "HGNode": None}  # fmt: skip
# LIAF runs stock's plain LIF over sequences unless it stores v_seq; the core of FlexSN is made to fire.
PACKED = {
    "ActivationAwareIFNode", "CUBALIFNode", "ComplementaryLIFNode", "EIFNode", "FlexSN", "GatedLIFNode",
    "HalfThresholdIFNode", "IFNode", "IzhikevichNode", "KLIFNode", "LIAFNode", "LIFNode", "MaskedPSN",
    "OTTTLIFNode", "PSN", "ParametricLIFNode", "QIFNode", "RAFNode", "SLTTLIFNode", "SimpleIFNode",
    "SimpleLIFNode", "SlidingPSN",
}  # fmt: skip


def example(name):
    if name in MADE:
        return MADE[name]()
    return getattr(neuron, name)(step_mode="m")


def test_what_stays_stock():
    stays = {}
    for name in ALL:
        if name in ABSTRACT or not issubclass(getattr(neuron, name), nn.Module):
            continue
        node = example(name)
        try:
            assert reversible_type(node) is not None, name
        except StaysStock as reason:
            stays[name] = str(reason)
    assert stays.keys() == STAYS_STOCK.keys()
    for name, reason in stays.items():
        assert STAYS_STOCK[name] in reason


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [n for n in ALL if n not in STAYS_STOCK and n not in ABSTRACT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_other_neuron(name, dtype):
    torch.manual_seed(4)
    node = example(name).to(dtype)
    modes = "ms" if name not in ONE_MODE else ONE_MODE[name] or [getattr(node, "step_mode", None)]
    for mode, store in itertools.product(modes, [False, True]):
        if hasattr(node, "store_v_seq"):
            node.store_v_seq = store
        elif hasattr(node, "store_state_seqs"):
            node.store_state_seqs = store
        if mode is not None and name != "PSN":
            node.step_mode = mode
        x = current(4, 2, 3, 4, 4, dtype=dtype)
        psn = "PSN" in name
        rev = check(node, x, calls=1 if psn else 2, taped=(False, True))
        if isinstance(node, neuron.BaseNode):
            check(node, x, torch.rand(2, 3, 4, 4, dtype=dtype), taped=(False, True))
            v = torch.rand(2, 3, 4, 4, dtype=dtype, requires_grad=True)
            check(node, x, v, calls=2, taped=(False, True))
        check(node, channels_last(x), taped=(True,), loss=LOSSES["permuted"])
        if not psn:
            check(node.eval(), x)
            node.train()
        functional.reset_net(rev)
        with tape.recording():
            out = rev(x if mode == "m" else x[0])
            assert packs(out[0] if isinstance(out, list) else out) == (
                name in PACKED and (name != "LIAFNode" or (mode == "m" and not store))
            )
        functional.reset_net(rev)


def test_a_parameter_changed_in_between_is_refused():
    node = converted(neuron.KLIFNode(step_mode="m"))
    out = node(current(4, 2, 3))
    with torch.no_grad():
        node.k.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_a_forward_that_is_not_the_same_twice_is_found():
    class Growing(Doubled):
        runs = itertools.count()

        def single_step_functional_forward(self, inputs, states, **kwargs):
            (out,), states = super().single_step_functional_forward(inputs, states)
            for _ in range(next(Growing.runs)):
                out = out.sin()
            return (out,), states

    node = converted(make(Growing))
    out = node(current(4, 2, 3))
    with pytest.raises(RuntimeError, match="not deterministic"):
        out.sum().backward()


def test_autocast_is_as_in_the_forward():
    class Mixed(neuron.LIFNode):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.mix = nn.Linear(3, 3)

        def single_step_functional_forward(self, inputs, states, **kwargs):
            return super().single_step_functional_forward((self.mix(inputs[0]).sigmoid(),), states)

        multi_step_functional_forward = Doubled.multi_step_functional_forward

    torch.manual_seed(0)
    stock = make(Mixed)
    rev = converted(stock)
    results = []
    for node in (stock, rev):
        torch.manual_seed(1)
        x = current(4, 2, 3)
        with torch.autocast("cpu", torch.bfloat16):
            out = node(x)
        out.float().sum().backward()
        results.append([out, x.grad, node.mix.weight.grad])
    assert all(map(same, *results))


def test_swapped_classes_are_made_once():
    a, b = (converted(neuron.QIFNode()) for _ in range(2))
    assert type(a) is type(b)
    assert isinstance(a, SwappedClass)
