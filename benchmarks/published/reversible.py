"""Families that save memory themselves: RevSNN, T-RevSNN, OTTT, SLTT.

Source: Zhang and Zhang, AAAI 2024 (RevSNN); Hu et al., ICML 2024 (T-RevSNN); Xiao et al., NeurIPS 2022
(OTTT); Meng et al., ICCV 2023 (SLTT).
"""

from __future__ import annotations

import torch
from torch import nn

from .family import Family
from .own_neurons import ZIF


def rev_snn(sj, width):
    """A function that runs its branches again in its backward, and calls `.backward()` there."""

    def branch(channels):
        return nn.Sequential(
            sj.neuron.MultiStepIFNode(
                detach_reset=True, surrogate_function=sj.surrogate.ATan(), backend="torch"
            ),
            sj.layer.SeqToANNContainer(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            ),
        )

    class ReversibleFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, blocks):
            with torch.no_grad():
                for block in blocks:
                    x = block.run(x)
            ctx.y, ctx.blocks = x.detach(), blocks
            return x

        @staticmethod
        def backward(ctx, dy):
            y = ctx.y
            for block in reversed(ctx.blocks):
                y, dy = block.back(y, dy)
            del ctx.y
            return dy, None

    class ReversibleBlock(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.f, self.g = branch(channels), branch(channels)

        def run(self, x):
            x1, x2 = torch.chunk(x, 2, dim=2)
            sj.functional.reset_net(self)
            y1 = x1 + self.f(x2)
            y2 = x2 + self.g(y1)
            return torch.cat([y1, y2], dim=2)

        def back(self, y, dy):
            y1, y2 = torch.chunk(y, 2, dim=2)
            dy1, dy2 = torch.chunk(dy, 2, dim=2)
            sj.functional.reset_net(self)
            with torch.enable_grad():
                y1.requires_grad = True
                gy1 = self.g(y1)
                torch.autograd.backward(gy1, dy2)
            with torch.no_grad():
                x2 = y2 - gy1
                dx1 = dy1 + y1.grad
                y1.grad = None
            with torch.enable_grad():
                x2.requires_grad = True
                fx2 = self.f(x2)
                torch.autograd.backward(fx2, dx1)
            with torch.no_grad():
                x1 = y1 - fx2
                dx2 = dy2 + x2.grad
                x2.grad = None
            return torch.cat([x1, x2.detach()], dim=2), torch.cat([dx1, dx2], dim=2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = sj.layer.SeqToANNContainer(
                nn.Conv2d(2, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
            )
            self.blocks = nn.ModuleList(ReversibleBlock(width) for _ in range(3))
            self.node = sj.neuron.MultiStepIFNode(surrogate_function=sj.surrogate.ATan(), backend="torch")
            self.fc = nn.Linear(2 * width, 10)

        def forward(self, x):
            self.node.reset()
            x = ReversibleFunction.apply(self.stem(x), self.blocks)
            return self.fc(self.node(x).mean((-1, -2))).mean(0)

    return Net()


def t_rev_snn(_sj, width):
    """Sub-networks a time step, states handed from step to step and level to level, their own function."""

    class Fire(nn.Module):
        def forward(self, x):
            return ZIF.apply(x - 0.5, 1.0)

    class Level(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.body = nn.Sequential(
                Fire(), nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
                nn.BatchNorm2d(channels),
                Fire(), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels),
            )  # fmt: skip

        def forward(self, below, above):
            return self.body(below if above is None else below + above)

    class SubNet(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.levels = nn.ModuleList(Level(channels) for _ in range(4))
            self.alphas = nn.ParameterList(
                nn.Parameter(torch.full((1, channels, 1, 1), 0.5)) for _ in range(4)
            )

        def forward(self, x, states):
            for alpha in self.alphas:
                data = alpha.data.abs().clamp_(min=1e-3)
                alpha.data.copy_(data * alpha.data.sign())
            return ReverseFunction.apply(self, x, *states, *self.parameters())

        def run(self, x, states):
            out, below = [], x
            for k, (level, alpha) in enumerate(zip(self.levels, self.alphas, strict=True)):
                above = states[k + 1] if k < 3 else None
                below = level(below, above) + alpha * states[k]
                out.append(below)
            return out

    class ReverseFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, net, x, *rest):
            states = rest[:4]
            with torch.no_grad():
                out = net.run(x, states)
            ctx.net, ctx.count = net, len(rest) - 4
            ctx.save_for_backward(x, *states)
            return tuple(out)

        @staticmethod
        def backward(ctx, *grads):
            x, *states = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            parameters = list(ctx.net.parameters())
            with torch.enable_grad():
                out = ctx.net.run(x, states)
                found = torch.autograd.grad(out, [x, *states, *parameters], grads, allow_unused=True)
            return (None, *found)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
            self.subnets = nn.ModuleList(SubNet(width) for _ in range(3))
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            x = self.stem(x)
            states = [torch.zeros_like(x) for _ in range(4)]
            outputs = []
            for subnet in self.subnets:
                states = subnet(x, states)
                outputs.append(self.head(states[-1].mean((-1, -2))))
            return outputs

    return Net()


def ottt(sj, width):
    """0.0.0.0.14: steps give spikes and a trace of them; weights take their gradient from the trace."""

    class OnlineLIFNode(sj.neuron.LIFNode):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.register_memory("rate_tracking", None)

        def neuronal_charge(self, x):
            self.v = self.v.detach() * (1 - 1.0 / self.tau) + x

        def forward(self, x, **kwargs):
            if kwargs.get("init", False):
                self.reset()
                self.v = torch.zeros_like(x)
            self.neuronal_charge(x)
            spike = self.surrogate_function(self.v - self.v_threshold)
            self.v = self.v - spike.detach() * self.v_threshold
            with torch.no_grad():
                tracked = self.rate_tracking
                self.rate_tracking = (
                    spike.clone() if tracked is None else tracked * (1 - 1.0 / self.tau) + spike
                )
            return torch.cat((spike, self.rate_tracking.clone().detach()))

    class ReplaceForGrad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, x_r):
            return x_r

        @staticmethod
        def backward(ctx, grad):
            return grad, grad

    class GradWrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            B = len(x) // 2
            spike, rate = x[:B], x[B:]
            with torch.no_grad():
                out = self.module(spike).detach()
            in_for_grad = ReplaceForGrad.apply(spike, rate)
            out_for_grad = self.module(in_for_grad)
            return ReplaceForGrad.apply(out_for_grad, out)

    class WSConv2d(nn.Conv2d):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 2.0))

        def forward(self, input):
            fan_in = self.weight[0].numel()
            mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
            weight = (self.weight - mean) / ((var * fan_in + 1e-4) ** 0.5) * self.gain
            return nn.functional.conv2d(input, weight, self.bias, self.stride, self.padding)

    def node():
        return OnlineLIFNode(
            tau=2.0, v_threshold=1.0, v_reset=None, surrogate_function=sj.surrogate.Sigmoid()
        )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.sn1 = WSConv2d(3, width, 3, padding=1), node()
            self.conv2, self.sn2 = GradWrapper(WSConv2d(width, width, 3, padding=1)), node()
            self.conv3, self.sn3 = GradWrapper(WSConv2d(width, 2 * width, 3, 2, 1)), node()
            self.fc = GradWrapper(nn.Linear(2 * width, 10))

        def forward(self, x, init=False):
            x = self.sn1(self.conv1(x), init=init)
            x = self.sn2(self.conv2(x), init=init)
            x = self.sn3(self.conv3(x), init=init)
            return self.fc(x.mean((-1, -2)))

    return Net()


def ottt_loss(model, x):
    """Goes backward at each step but the last."""
    labels = torch.arange(len(x), device=x.device) % 10
    total = 0.0
    for t in range(4):
        loss = nn.functional.cross_entropy(model(x, init=t == 0).float(), labels) / 4
        if t < 3:
            loss.backward()
        total += loss.detach()
    return loss


def sltt(sj, width):
    """0.0.0.0.12: a neuron that detaches its membrane; the loop and its backward stand in the script."""

    class SLTTNeuron(sj.neuron.LIFNode):
        def neuronal_charge(self, x):
            v = self.v.detach() if isinstance(self.v, torch.Tensor) else self.v
            self.v = v * (1 - 1.0 / self.tau) + x

    def node():
        return SLTTNeuron(tau=2.0, v_reset=None, detach_reset=True, surrogate_function=sj.surrogate.ATan())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), node(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), node(),
                nn.AvgPool2d(2),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), node(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )  # fmt: skip
            self.classifier = nn.Linear(width, 10)

        def forward(self, x):
            return self.classifier(self.features(x))

    return Net()


def sltt_loss(model, x):
    """One step of the script: time steps one after another, each with its own backward."""
    for module in model.modules():
        if hasattr(module, "reset"):
            module.reset()
    labels = torch.arange(x.shape[1], device=x.device) % 10
    for t in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[t]).float(), labels) / len(x)
        if t < len(x) - 1:
            loss.backward()
    return loss


FAMILIES = (
    Family(
        "RevSNN",
        rev_snn,
        "0.0.0.0.12",
        (4, (3, 2, 2, 8, 8)),
        (32, (4, 10, 2, 32, 32)),
        own_procedure=True,
        amp=False,
    ),
    Family("T-RevSNN", t_rev_snn, None, (4, (2, 3, 8, 8)), (64, (30, 3, 32, 32)), own_procedure=True),
    Family(
        "OTTT",
        ottt,
        "0.0.0.0.14",
        (4, (2, 3, 8, 8)),
        (64, (34, 3, 32, 32)),
        ottt_loss,
        own_procedure=True,
        kwargs={"init": True},
    ),
    Family(
        "SLTT",
        sltt,
        "0.0.0.0.12",
        (4, (3, 2, 2, 8, 8)),
        (64, (4, 44, 2, 32, 32)),
        sltt_loss,
        own_procedure=True,
        one_call=lambda x: x[0],
    ),
)
