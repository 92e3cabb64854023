"""Neurons of frameworks that the converter has no adapter for: BrainCog's, norse's, sinabs'.

Source: Zeng et al., "BrainCog", Patterns 2023; Pehle and Pedersen, "Norse", 2021; Sheik et al., "Sinabs".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


class _Arctan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x, alpha)
        return x.gt(0).float()

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        shape = math.pi / 2 * alpha * x
        return alpha / 2 / (1 + shape.square()) * grad, None


def braincog(_sj, width):
    """A base class with `integral` and `calc_spike`, a membrane that is 0.0 at first, steps one by one."""

    class Surrogate(nn.Module):
        def __init__(self, alpha=2.0):
            super().__init__()
            self.alpha = nn.Parameter(torch.tensor(alpha), requires_grad=False)

        def forward(self, x):
            return _Arctan.apply(x, self.alpha)

    class BaseNode(nn.Module):
        def __init__(self, threshold=0.5, tau=2.0, mem_detach=False):
            super().__init__()
            self.threshold = nn.Parameter(torch.tensor(threshold), requires_grad=False)
            self.tau, self.mem_detach, self.act = tau, mem_detach, Surrogate()
            self.n_reset()

        def n_reset(self):
            self.mem, self.spike = 0.0, 0.0

        def integral(self, inputs):
            raise NotImplementedError

        def calc_spike(self):
            self.spike = self.act(self.mem - self.threshold)
            self.mem = self.mem * (1 - self.spike.detach())

        def forward(self, inputs):
            if self.mem_detach and isinstance(self.mem, torch.Tensor):
                self.mem = self.mem.detach()
            self.integral(inputs)
            self.calc_spike()
            return self.spike

    class LIFNode(BaseNode):
        def integral(self, inputs):
            self.mem = self.mem + (inputs - self.mem) / self.tau

    class BaseConvModule(nn.Module):
        def __init__(self, inp, out):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out)
            self.node = LIFNode()

        def forward(self, x):
            return self.node(self.bn(self.conv(x)))

    class Net(nn.Module):
        def __init__(self, step=4):
            super().__init__()
            self.step = step
            self.feature = nn.Sequential(
                BaseConvModule(2, width), BaseConvModule(width, width), nn.AvgPool2d(2),
                BaseConvModule(width, 2 * width),
            )  # fmt: skip
            self.fc = nn.Linear(2 * width, 10)

        def reset(self):
            for module in self.modules():
                if hasattr(module, "n_reset"):
                    module.n_reset()

        def forward(self, inputs):
            self.reset()
            outputs = [self.fc(self.feature(inputs[:, t]).mean((-1, -2))) for t in range(self.step)]
            return sum(outputs) / len(outputs)

    return Net()


class _SuperSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return torch.gt(x, 0.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (ctx.alpha * x.abs() + 1.0).pow(2), None


class _LIFState(NamedTuple):
    v: torch.Tensor
    i: torch.Tensor


def norse(_sj, width):
    """Steps as functions of an input and a named tuple of states, which a sequence of modules hands on."""

    class LIFParameters(NamedTuple):
        tau_syn_inv: torch.Tensor = torch.as_tensor(200.0)
        tau_mem_inv: torch.Tensor = torch.as_tensor(100.0)
        v_leak: torch.Tensor = torch.as_tensor(0.0)
        v_th: torch.Tensor = torch.as_tensor(0.02)
        v_reset: torch.Tensor = torch.as_tensor(0.0)
        alpha: float = 10.0

    def lif_feed_forward_step(x, state, p, dt=0.001):
        i = state.i + x
        v = state.v + dt * p.tau_mem_inv * ((p.v_leak - state.v) + i)
        i = i - dt * p.tau_syn_inv * i
        z = _SuperSpike.apply(v - p.v_th, p.alpha)
        v = (1 - z.detach()) * v + z.detach() * p.v_reset
        return z, _LIFState(v, i)

    class LIFCell(nn.Module):
        def forward(self, x, state=None):
            if state is None:
                state = _LIFState(torch.zeros_like(x), torch.zeros_like(x))
            return lif_feed_forward_step(x, state, LIFParameters())

    class SequentialState(nn.Sequential):
        def forward(self, x, states=None):
            states = [None] * len(self) if states is None else states
            for index, module in enumerate(self):
                if isinstance(module, LIFCell):
                    x, states[index] = module(x, states[index])
                else:
                    x = module(x)
            return x, states

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = SequentialState(
                nn.Conv2d(2, width, 3, padding=1, bias=False), LIFCell(), nn.AvgPool2d(2),
                nn.Conv2d(width, width, 3, padding=1, bias=False), LIFCell(),
                nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), LIFCell(),
            )  # fmt: skip
            self.readout = nn.Linear(2 * width, 10)

        def forward(self, x):
            states, voltages = None, []
            for step in x:
                spikes, states = self.layers(8 * step, states)
                voltages.append(self.readout(spikes.mean((-1, -2))))
            return torch.stack(voltages).max(0).values

    return Net()


class _SingleSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v_mem, spike_threshold, surrogate):
        ctx.save_for_backward(v_mem.clone())
        ctx.spike_threshold, ctx.surrogate = spike_threshold, surrogate
        return (v_mem - spike_threshold > 0).float()

    @staticmethod
    def backward(ctx, grad):
        (v_mem,) = ctx.saved_tensors
        return grad * ctx.surrogate(v_mem, ctx.spike_threshold), None, None


def sinabs(_sj, width):
    """Batches with their steps in the second dimension, flattened for convolutions; membranes are buffers
    that stay from call to call, without their history; the surrogate saves a copy."""

    def exponential(v_mem, threshold):
        return torch.exp(-(v_mem - threshold).abs() / 0.5)

    class LIF(nn.Module):
        def __init__(self, steps, tau_mem=5.0, min_v_mem=-1.0):
            super().__init__()
            self.steps, self.min_v_mem, self.spike_threshold = steps, min_v_mem, 0.2
            self.alpha = nn.Parameter(torch.exp(torch.tensor(-1.0 / tau_mem)), requires_grad=False)
            self.register_buffer("v_mem", torch.zeros(0), persistent=False)

        def reset_states(self):
            self.v_mem = torch.zeros(0, device=self.v_mem.device)

        def forward(self, data):
            data = data.reshape(-1, self.steps, *data.shape[1:])
            v_mem, spikes = self.v_mem, []
            if v_mem.shape != data[:, 0].shape:
                v_mem = torch.zeros_like(data[:, 0])
            for step in range(self.steps):
                v_mem = self.alpha * v_mem + data[:, step]
                spikes.append(_SingleSpike.apply(v_mem, self.spike_threshold, exponential))
                v_mem = v_mem - spikes[-1] * self.spike_threshold
                v_mem = F.relu(v_mem - self.min_v_mem) + self.min_v_mem
            self.v_mem = v_mem.detach()
            return torch.stack(spikes, 1).flatten(0, 1)

    class Net(nn.Module):
        def __init__(self, steps=6):
            super().__init__()
            self.steps = steps
            self.spiking = nn.Sequential(
                nn.Conv2d(2, width, 3, padding=1, bias=False), LIF(steps), nn.AvgPool2d(2),
                nn.Conv2d(width, width, 3, padding=1, bias=False), LIF(steps),
                nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), LIF(steps),
            )  # fmt: skip
            self.fc = nn.Linear(2 * width, 10)

        def forward(self, x):
            for module in self.modules():
                if hasattr(module, "reset_states"):
                    module.reset_states()
            spikes = self.spiking(4 * x.flatten(0, 1)).unflatten(0, (-1, self.steps))
            return self.fc(spikes.mean((1, -1, -2)))

    return Net()


FAMILIES = (
    Family("BrainCog", braincog, None, (4, (3, 4, 2, 8, 8)), (64, (10, 4, 2, 32, 32))),
    Family("norse", norse, None, (4, (5, 3, 2, 8, 8)), (64, (6, 16, 2, 32, 32))),
    Family("sinabs", sinabs, None, (4, (3, 6, 2, 8, 8)), (64, (14, 6, 2, 32, 32))),
)
