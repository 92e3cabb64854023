"""Ctrl-C at any place: the user sees KeyboardInterrupt, and the next step is as if nothing had been."""

import os
import random
import signal
import sys
import warnings
from pathlib import Path

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack, _push_mode

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.ops.interrupts import put_back_interrupted

PACKAGE = str(Path(srp.__file__).parent)
# Places that are tried in a network, drawn with a seed; more of them take minutes.
MOST = int(os.environ.get("SRP_INTERRUPTS", "8"))


class Interrupt:
    """Raises KeyboardInterrupt at one event in the package's own frames; None: counts them."""

    def __init__(self, at, opcodes=False):
        self.at, self.opcodes, self.events, self.where = at, opcodes, 0, None

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc):
        sys.settrace(None)

    def _call(self, frame, event, _arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = self.opcodes
        return self._line

    def _line(self, frame, event, _arg):
        if event == ("opcode" if self.opcodes else "line"):
            self.events += 1
            if self.events == self.at:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


class OfSnnTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 6), snntorch.Leaky(beta=0.9, learn_beta=True, init_hidden=True)
        self.out, self.syn = nn.Linear(6, 3), snntorch.Synaptic(alpha=0.8, beta=0.7)

    def forward(self, x_seq):
        syn, out, total = *self.syn.init_synaptic(), 0
        for x in x_seq:
            spikes, syn, out = self.syn(self.out(self.lif(self.fc(x))), syn, out)
            total = total + spikes + out
        return total


def of_spikingjelly():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(2), neuron.LIFNode(step_mode="m"), nn.Linear(6, 6), nn.Dropout(0.3),
        neuron.ParametricLIFNode(step_mode="m"), neuron.GatedLIFNode(T=3, step_mode="m"),
        neuron.EIFNode(step_mode="m"),
    )  # fmt: skip


def chain():
    def branch():
        return nn.Sequential(
            neuron.LIFNode(step_mode="m"), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.2)
        )

    return nn.Sequential(srp.RevSSequence([srp.RevSBlock(branch(), branch(), dim=2) for _ in range(2)]))


NETWORKS = {
    "snntorch, stock": (OfSnnTorch, "stock"),
    "snntorch, grid": (OfSnnTorch, "auto"),
    "spikingjelly": (of_spikingjelly, "stock"),
    "chain": (chain, "stock"),
}


def reset(net):
    functional.reset_net(net)
    for module in net.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()


class Training:
    """A network whose steps can be taken again from where it was."""

    def __init__(self, name):
        make, arithmetic = NETWORKS[name]
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = srp.convert_to_reversible(make(), arithmetic=arithmetic)
        self.net.train()  # neurons share SpikingJelly's default surrogate, and others evaluate theirs
        self.state = {key: value.clone() for key, value in self.net.state_dict().items()}
        self.parameters = list(self.net.parameters())
        self.x_seq = torch.rand(3, 2, 4) * 2

    def start(self):
        put_back_interrupted()  # as the next call does; what is loaded here is no part of a training script
        reset(self.net)
        self.net.load_state_dict(self.state)
        self.net.zero_grad()
        torch.manual_seed(3)

    def step(self):
        self.net(self.x_seq).square().sum().backward()

    def result(self):
        """Of a whole step: gradients, statistics, and what is left on the thread."""
        self.start()
        self.step()
        assert list(map(id, self.net.parameters())) == list(map(id, self.parameters))
        assert self.net.training and all(module.training for module in self.net.modules())
        gradients = [p.grad for p in self.parameters]
        statistics = [buffer.clone() for buffer in self.net.buffers()]
        return [*gradients, *statistics]


def assert_thread_is_clean():
    assert tape.current() is None
    assert not _len_torch_dispatch_stack()
    assert torch.is_grad_enabled()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not torch.is_inference_mode_enabled()


def interrupt_everywhere(name, opcodes, most):
    training = Training(name)
    expected = training.result()
    events = []
    for _ in range(4):  # the first ones clear away what earlier tests left
        training.start()
        with Interrupt(None, opcodes) as counted:
            training.step()
        events.append(counted.events)
    length, tried = min(events), 0
    assert length > 100
    places = range(1, length + 1)
    for place in sorted(random.Random(0).sample(places, most)) if len(places) > most else places:
        at = place
        for _ in range(4):  # a later step may be shorter, by what is cached: the place moves with its end
            training.start()
            interrupt = Interrupt(at, opcodes)
            try:
                with interrupt:
                    training.step()
            except KeyboardInterrupt:
                tried += 1
                break
            assert interrupt.where is None, f"an interrupt at {interrupt.where} was swallowed"
            at = place * interrupt.events // length
        found = training.result()
        assert_thread_is_clean()
        for ours, fresh in zip(found, expected, strict=True):
            same = ours is fresh is None or torch.equal(ours, fresh)
            assert same, f"after an interrupt at {interrupt.where}"
    assert tried > 0.9 * min(len(places), most)
    print(f"{name}: {tried} interrupts")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "opcodes"])
def test_the_next_step_is_a_fresh_ones(name, opcodes):
    interrupt_everywhere(name, opcodes, MOST)


@pytest.mark.parametrize("hole", ["__exit__", "put_back"])
def test_what_an_interrupt_left_on_the_thread_is_cleared_by_the_next_call(hole):
    """It came in the code that would have taken the tape off, and nobody else does."""
    training = Training("spikingjelly")
    expected = training.result()
    training.start()
    came = []

    def trace(frame, event, _arg):
        self = frame.f_locals.get("self")
        outermost = isinstance(self, tape.recording) and getattr(self, "_tape", None) is not None
        if frame.f_code.co_name == hole and outermost:
            came.append(tape.current())
            sys.settrace(None)
            raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            training.net(training.x_seq)
    finally:
        sys.settrace(None)
    assert came[0] is not None and tape.current() is came[0]
    reset(training.net)
    torch.manual_seed(3)
    training.net(training.x_seq)
    assert_thread_is_clean()
    for ours, fresh in zip(training.result(), expected, strict=True):
        assert ours is fresh is None or torch.equal(ours, fresh)


@pytest.mark.parametrize("kind", ["no_grad", "autocast", "mode", "hooks"])
def test_what_is_on_inside_ends_with_the_recording(kind):
    """As if an interrupt had kept an inner context manager from leaving."""
    before = torch.is_autocast_enabled("cpu")

    def interrupted():
        with tape.recording():
            if kind == "no_grad":
                torch.no_grad().__enter__()
            elif kind == "autocast":
                torch.autocast("cpu").__enter__()
            elif kind == "mode":
                _push_mode(TorchDispatchMode())
            else:
                torch.autograd.graph.saved_tensors_hooks(abs, abs).__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_thread_is_clean()
    assert torch.is_autocast_enabled("cpu") is before
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that send signals here")
@pytest.mark.parametrize("name", ["snntorch, grid", "spikingjelly"])
def test_signals_at_random_moments(name):
    """Real ones, which Python also looks for in the middle of what torch calls back."""
    training, draw = Training(name), random.Random(1)
    expected = training.result()

    def train_until_a_signal(seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        for _ in range(1000):
            reset(training.net)  # and no load_state_dict: torch's own no_grad is left on by an interrupt
            training.step()

    seen = 0
    for _ in range(20):
        training.start()
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            train_until_a_signal(draw.uniform(1e-3, 2e-2))
        except KeyboardInterrupt:
            seen += 1  # Python swallows one that comes while it collects garbage
        finally:
            signal.signal(signal.SIGALRM, before)
        for ours, fresh in zip(training.result(), expected, strict=True):
            assert ours is fresh is None or torch.equal(ours, fresh)
        assert_thread_is_clean()
    assert seen > 10
