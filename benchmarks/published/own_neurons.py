"""Networks that have their neurons themselves: TET, NDA, GLIF, DSR, Dspike's kin; one loop over time each.

Source: Deng et al., ICLR 2022 (TET); Li et al., ECCV 2022 (NDA); Yao et al., NeurIPS 2022 (GLIF); Meng
et al., CVPR 2022 (DSR).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


class ZIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, gama):
        out = (input > 0).float()
        L = torch.tensor([gama])
        ctx.save_for_backward(input, out, L)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        (input, _out, others) = ctx.saved_tensors
        gama = others[0].item()
        grad_input = grad_output.clone()
        tmp = (1 / gama) * (1 / gama) * ((gama - input.abs()).clamp(min=0))
        return grad_input * tmp, None


class SeqToANNContainer(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.module = args[0] if len(args) == 1 else nn.Sequential(*args)

    def forward(self, x_seq):
        y_shape = [x_seq.shape[0], x_seq.shape[1]]
        y_seq = self.module(x_seq.flatten(0, 1).contiguous())
        y_shape.extend(y_seq.shape[1:])
        return y_seq.view(y_shape)


def _vgg(width, neuron, pool, dropout=0.25):
    """Batch first, as TET has it: [N, T, C, H, W]."""

    class Layer(nn.Module):
        def __init__(self, inp, out):
            super().__init__()
            self.fwd = SeqToANNContainer(nn.Conv2d(inp, out, 3, 1, 1), nn.BatchNorm2d(out))
            self.act = neuron()

        def forward(self, x):
            return self.act(self.fwd(x))

    class VGGSNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                Layer(2, width),
                Layer(width, 2 * width),
                SeqToANNContainer(pool(2)),
                Layer(2 * width, 2 * width),
                SeqToANNContainer(pool(2)),
                Layer(2 * width, 4 * width),
            )
            self.dropout = SeqToANNContainer(nn.Dropout(dropout))
            self.classifier = SeqToANNContainer(nn.Linear(4 * width, 10))

        def forward(self, input):
            x = self.features(input)
            x = self.dropout(x.mean((-1, -2)))
            return self.classifier(x)

    return VGGSNN()


def tet(_sj, width):
    """A list of spikes stacked along the second dimension; the loss is taken at each time step."""

    class LIFSpike(nn.Module):
        def __init__(self, thresh=1.0, tau=0.5, gama=1.0):
            super().__init__()
            self.act, self.thresh, self.tau, self.gama = ZIF.apply, thresh, tau, gama

        def forward(self, x):
            mem = 0
            spike_pot = []
            T = x.shape[1]
            for t in range(T):
                mem = mem * self.tau + x[:, t, ...]
                spike = self.act(mem - self.thresh, self.gama)
                mem = (1 - spike) * mem
                spike_pot.append(spike)
            return torch.stack(spike_pot, dim=1)

    return _vgg(width, LIFSpike, nn.AvgPool2d)


def tet_loss(model, x):
    """Cross entropy of each step, and a pull of the outputs towards the threshold."""
    outputs = model(x)
    labels = torch.arange(len(x), device=x.device) % 10
    T = outputs.size(1)
    loss = 0
    for t in range(T):
        loss = loss + F.cross_entropy(outputs[:, t, ...].float(), labels)
    loss = loss / T
    y = torch.zeros_like(outputs).fill_(1.0)
    return 0.95 * loss + 0.05 * F.mse_loss(outputs.float(), y.float())


def nda(_sj, width):
    """Reset by subtraction written as a product, max pooling, and a surrogate of a comparison in place."""

    class Rectangle(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            spike = torch.zeros_like(v)
            spike[v >= 0.5] = 1.0
            return spike

        @staticmethod
        def backward(ctx, grad):
            (v,) = ctx.saved_tensors
            mask = torch.zeros_like(v)
            mask[torch.abs(v - 0.5) < 0.5] = 1.0
            return grad * mask

    class LIFAct(nn.Module):
        def forward(self, x):
            u = torch.zeros_like(x[:, 0])
            out = []
            for i in range(x.shape[1]):
                u = 0.25 * u + x[:, i]
                out += [Rectangle.apply(u)]
                u = u - 0.5 * out[-1]
            return torch.stack(out, 1)

    return _vgg(width, LIFAct, nn.MaxPool2d)


def glif(_sj, width):
    """Gates between leaks and resets, one parameter a channel, `out[step] = ...`; a spike read from out."""

    class LIFSpike_CW(nn.Module):
        def __init__(self, inplace, steps):
            super().__init__()
            self.T = steps
            self.alpha, self.beta, self.gamma = (
                nn.Parameter(0.2 * (torch.rand(inplace) - 0.5)) for _ in range(3)
            )
            self.tau = nn.Parameter(-torch.log(1 / (torch.full((inplace,), 0.25)) - 1))
            self.Vth = nn.Parameter(-torch.log(1 / (torch.full((inplace,), 0.5)) - 1))
            self.leak = nn.Parameter(-torch.log(1 / torch.full((inplace,), 0.1) - 1))
            self.reVth = nn.Parameter(-torch.log(1 / torch.full((inplace,), 0.5) - 1))
            self.conduct = nn.Parameter(-torch.log(1 / torch.full((steps, inplace), 0.5) - 1))

        def forward(self, x):
            u = torch.zeros(x.shape[1:], device=x.device)
            out = torch.zeros(x.shape, device=x.device)
            for step in range(self.T):
                u, out[step] = self.extended_state_update(u, out[max(step - 1, 0)], x[step], step)
            return out

        def extended_state_update(self, u_t_n1, o_t_n1, W_mul_o_t1_n, step):
            tau, Vth, leak, conduct, reVth = (
                p.view(1, -1, 1, 1).sigmoid()
                for p in (self.tau, self.Vth, self.leak, self.conduct[step], self.reVth)
            )
            al, be, ga = (p.view(1, -1, 1, 1).sigmoid() for p in (self.alpha, self.beta, self.gamma))
            I_t1 = W_mul_o_t1_n + be * I_gate(conduct, W_mul_o_t1_n)
            u_t1_n1 = ((1 - al * (1 - tau)) * u_t_n1 * (1 - ga * o_t_n1.clone())) - (1 - al) * leak + I_t1
            u_t1_n1 = u_t1_n1 - (1 - ga) * reVth * o_t_n1.clone()
            return u_t1_n1, ZIF.apply(u_t1_n1 - Vth, 1.0)

    def I_gate(conduct, current):
        return current * (conduct - 1)

    class tdLayer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x.reshape(-1, *x.shape[2:])).reshape(x.shape[0], x.shape[1], -1, *x.shape[3:])

    def conv(inp, out):
        return tdLayer(nn.Sequential(nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.T = 4
            self.conv1, self.spike1 = conv(3, width), LIFSpike_CW(width, 4)
            self.conv2, self.spike2 = conv(width, width), LIFSpike_CW(width, 4)
            self.conv3, self.spike3 = conv(width, width), LIFSpike_CW(width, 4)
            self.fc = nn.Linear(width, 10)

        def forward(self, x):
            x, _ = torch.broadcast_tensors(x, torch.zeros((self.T, *x.shape), device=x.device))
            x = self.spike1(self.conv1(x))
            residual = x
            x = self.spike2(self.conv2(x))
            x = self.spike3(self.conv3(x) + residual)
            return self.fc(x.mean((0, -1, -2)))

    return Net()


def dsr(_sj, width):
    """Spikes forward in a loop, the gradient of the rate's clamp backward; thresholds that are learned."""

    class IFFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, Vth, steps):
            mem = 0.5 * Vth
            out = torch.zeros_like(x)
            for t in range(steps):
                mem = mem + x[t]
                spike = (mem >= Vth).float() * Vth
                mem = mem - spike
                out[t] = spike
            ctx.save_for_backward(x.mean(0), Vth)
            ctx.steps = steps
            return out

        @staticmethod
        def backward(ctx, grad):
            rate, Vth = ctx.saved_tensors
            grad = grad.mean(0)
            inside = ((rate > 0) & (rate < Vth)).to(grad)
            grad_v = (grad * (rate >= Vth).to(grad)).sum().reshape(Vth.shape)
            return (grad * inside).unsqueeze(0).repeat(ctx.steps, *[1] * rate.ndim), grad_v, None

    class IFNeuron(nn.Module):
        def __init__(self):
            super().__init__()
            self.Vth = nn.Parameter(torch.tensor([1.0]))

        def forward(self, x):
            with torch.no_grad():
                self.Vth.copy_(self.Vth.clamp(min=0.01))
            return IFFunction.apply(x, self.Vth, len(x))

    def per_step(*layers):
        return SeqToANNContainer(*layers)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            widths = (3, width, width, 2 * width)
            self.parts = nn.Sequential()
            for inp, out in itertools.pairwise(widths):
                self.parts.append(per_step(nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out)))
                self.parts.append(IFNeuron())
            self.pool, self.fc = per_step(nn.AvgPool2d(2)), nn.Linear(2 * width, 10)

        def forward(self, x):
            x = x.unsqueeze(0).expand(6, *x.shape)
            return self.fc(self.pool(self.parts(x)).mean((0, -1, -2)))

    return Net()


FAMILIES = (
    Family("TET", tet, None, (4, (2, 4, 2, 8, 8)), (64, (4, 8, 2, 32, 32)), tet_loss),
    Family("NDA", nda, None, (4, (2, 4, 2, 8, 8)), (64, (4, 8, 2, 32, 32))),
    Family("GLIF", glif, None, (4, (2, 3, 8, 8)), (64, (8, 3, 32, 32))),
    Family("DSR", dsr, None, (4, (2, 3, 8, 8)), (64, (8, 3, 32, 32))),
)
