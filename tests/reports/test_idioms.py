"""``verify`` says which idioms of the user's own no tape can see, and what is bits and what is kept."""

import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import lif
from snn_reversible_plugin.tape.unseen import WrittenUnseen

snntorch = pytest.importorskip("snntorch")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer  # noqa: E402


class Net(nn.Module):
    """Two layers with an idiom between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif, self.out = nn.Linear(8, 64), neuron.LIFNode(step_mode="m"), nn.Linear(64, 3)
        self.calls, self.seen = 0, []
        self.generator = np.random.default_rng(0)

    def between(self, x):
        return x

    def forward(self, x):
        functional.reset_net(self)
        return self.out(self.between(self.lif(self.fc(x))))


class NumpyMask(Net):
    def between(self, x):
        return x * torch.from_numpy((np.random.rand(*x.shape) > 0.5).astype(np.float32))  # noqa: NPY002


class OwnGenerator(Net):
    def between(self, x):
        return x * float(self.generator.random())


class CoinOfPython(Net):
    def between(self, x):
        return x * 2 if random.random() < 0.5 else x


class Counting(Net):
    def between(self, x):
        self.calls += 1
        return x * self.calls


class Logging(Net):
    def between(self, x):
        self.seen.append(float(x.mean()))
        return x


class ScaledByNumpy(Net):
    def between(self, x):
        x = x.sigmoid()
        x.detach().numpy()[:] *= 0.5
        return x.square()


class ScaledThroughData(Net):
    def between(self, x):
        x = x.sigmoid()
        x.data.mul_(0.5)
        return x.square()


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        np.multiply(x.numpy(), 0.5, out=out.numpy())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * (0.5 + 0 * ctx.saved_tensors[0])


class ByAKernel(Net):
    def between(self, x):
        return Kernel.apply(x)


X = torch.rand(4, 2, 8, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("cls", "operation", "remedy"),
    [
        (NumpyMask, "draws random numbers by numpy.random", "torch"),
        (NumpyMask, r"shape \(4, 2, 64\) .* lies in memory of numpy", "clone"),
        (OwnGenerator, "changes the attribute 'generator'", "buffer"),
        (CoinOfPython, "draws random numbers by random", "torch"),
        (Counting, "changes the attribute 'calls'", "buffer"),
        (Logging, "changes the attribute 'seen'", "buffer"),
        (ScaledByNumpy, "the output of sigmoid, was written to by what torch does not see", "copy_"),
        (ScaledThroughData, "is written to through .data", "no_grad"),
        (ByAKernel, "empty_like .* room that a kernel may fill", "save what it is given"),
    ],
)
def test_an_idiom_is_found_where_it_is(cls, operation, remedy, capsys):
    verification = srp.verify(srp.convert_to_reversible(cls()), X, repeats=1)
    (found,) = [one for one in verification.unseen if re.search(operation, one.operation)]
    assert found.module == "model" and remedy in found.remedy
    assert found in [type(found)(**one) for one in verification.to_dict()["unseen"]]
    verification.print()
    assert "not seen in" in capsys.readouterr().out
    if cls not in (OwnGenerator, ScaledByNumpy, ScaledThroughData):
        assert verification.ok, "it is no fault by itself"


def test_networks_of_both_frameworks_have_no_idioms():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(8, 16), snntorch.Leaky(beta=0.9, learn_beta=True)
            self.hidden = snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True)

        def forward(self, x_seq):
            self.hidden.reset_hidden()
            mem = self.lif.init_leaky()
            for x in x_seq:
                spikes, mem = self.lif(self.fc(x), mem)
                out = self.hidden(spikes)
            return mem + out

    convolutions = nn.Sequential(
        layer.Conv2d(2, 4, 3, step_mode="m"), layer.BatchNorm2d(4, step_mode="m"),
        neuron.LIFNode(step_mode="m"), layer.Dropout(0.3, step_mode="m"), layer.MaxPool2d(2, step_mode="m"),
        neuron.PSN(T=4), neuron.GatedLIFNode(T=4, step_mode="m"),
    )  # fmt: skip
    for net, x in ((Loop(), X), (convolutions, torch.rand(4, 2, 2, 8, 8))):
        verification = srp.verify(srp.convert_to_reversible(net), x, repeats=1)
        assert verification.ok and not verification.unseen


def test_check_mode_names_the_module_and_the_operation():
    net = srp.convert_to_reversible(ScaledByNumpy())
    message = r"^model: .*output of sigmoid.* Write by operations of torch"
    with pytest.raises(WrittenUnseen, match=message), srp.reversible(net, check=True):
        net(X)


def test_neurons_of_ones_own_are_bits_and_what_is_kept_says_why(capsys):
    class Own(nn.Module):
        def forward(self, x):
            self.spikes = lif(x)  # kept, so that the tape records it
            return self.spikes

    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    with pytest.warns(UserWarning, match="knows"):
        net = srp.convert_to_reversible(
            nn.Sequential(nn.Linear(8, 64), Own(), nn.Linear(64, 64), Noise(), nn.Linear(64, 2))
        )
    verification = srp.verify(net, X, repeats=1)
    assert any(one.module == "1" and one.operation == "gt" for one in verification.bits)
    (noise,) = [one for one in verification.kept if one.operation == "rand_like"]
    assert noise.module == "3" and "bernoulli" in noise.remedy
    verification.print()
    out = capsys.readouterr().out
    assert "bits in 1" in out and "kept in full in 3" in out
