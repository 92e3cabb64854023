"""Sound and language: SNN-delays, SpikeGPT, Spiking-FullSubNet, speech transformers, adaptive recurrence.

Source: Hammouamri et al., ICLR 2024 (learned delays); Zhu et al., TMLR 2024 (SpikeGPT); Hao et al., 2024
(Spiking-FullSubNet); Wang et al., 2023 (spiking transformers for speech); Yin et al., Nature Machine
Intelligence 2021.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


def snn_delays(sj, width):
    """0.0.0.0.14, `store_v_seq=True`: convolutions over time whose kernels are gaussians at learned places,
    and an output neuron that can't fire, whose `v_seq` is read."""

    class Dcls1d(nn.Module):
        def __init__(self, inp, out, length=5):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(out, inp))
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(0.2))
            self.P = nn.Parameter((torch.rand(out, inp) - 0.5) * length)
            self.SIG = nn.Parameter(torch.full((out, inp), 1.0), requires_grad=False)
            self.length = length

        def forward(self, x):
            place = torch.arange(self.length, device=x.device) - self.length // 2
            gauss = torch.exp(
                -0.5 * ((place - self.P.unsqueeze(-1)) / (self.SIG.unsqueeze(-1) + 0.27)) ** 2
            )
            kernel = self.weight.unsqueeze(-1) * gauss / (gauss.sum(-1, keepdim=True) + 1e-7)
            return F.conv1d(x, kernel)

    class SnnDelays(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()
            for inp, out, last in ((6, width, False), (width, width, False), (width, 5, True)):
                threshold = 1e9 if last else 1.0
                neuron = sj.neuron.LIFNode(
                    tau=1.05, v_threshold=threshold, surrogate_function=sj.surrogate.ATan(alpha=5.0),
                    detach_reset=False, step_mode="m", decay_input=False, store_v_seq=True,
                )  # fmt: skip
                norm = sj.layer.BatchNorm1d(out, step_mode="m")
                dropout = sj.layer.Dropout(0.4, step_mode="m")
                rest = [neuron] if last else [norm, neuron, dropout]
                self.blocks.append(nn.ModuleList([Dcls1d(inp, out), nn.ModuleList(rest)]))

        def forward(self, x):
            sj.functional.reset_net(self)
            for delays, rest in self.blocks:
                x = F.pad(x.permute(1, 2, 0), (4, 0), "constant", 0)
                x = delays(x).permute(2, 0, 1)
                if len(rest) > 1:
                    x = rest[0](x.unsqueeze(3)).squeeze(3)
                    x = rest[2](rest[1](x))
                else:
                    rest[0](x)
            return self.blocks[-1][1][-1].v_seq

    return SnnDelays()


def snn_delays_loss(model, x):
    """The softmax of each step, summed over time, as their `sum` loss."""
    membranes = F.softmax(model(x).float(), dim=2)
    labels = torch.arange(x.shape[1], device=x.device) % 5
    return F.cross_entropy(membranes.sum(0), labels)


def spike_gpt(sj, width):
    """Tokens; time mixing by a recurrence over positions, a neuron after each sub-layer."""

    def wkv(w, u, k, v):
        w = -torch.exp(w)
        aa, bb, pp = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], -1e38)
        y = torch.empty_like(v)
        for t in range(k.shape[1]):
            kk, vv = k[:, t], v[:, t]
            ww = u + kk
            p = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - p), torch.exp(ww - p)
            y[:, t] = (e1 * aa + e2 * vv) / (e1 * bb + e2)
            ww = pp + w
            p = torch.maximum(ww, kk)
            e1, e2 = torch.exp(ww - p), torch.exp(kk - p)
            aa, bb, pp = e1 * aa + e2 * vv, e1 * bb + e2, p
        return y

    class RWKV_TimeMix(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.time_decay, self.time_first = (
                nn.Parameter(torch.linspace(-3, 1, dim)),
                nn.Parameter(torch.zeros(dim)),
            )
            self.time_mix_k, self.time_mix_r = (
                nn.Parameter(torch.full((1, 1, dim), 0.6)) for _ in range(2)
            )
            self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
            self.key, self.value, self.receptance, self.output = (
                nn.Linear(dim, dim, bias=False) for _ in range(4)
            )

        def forward(self, x):
            xx = self.time_shift(x)
            xk = x * self.time_mix_k + xx * (1 - self.time_mix_k)
            xr = x * self.time_mix_r + xx * (1 - self.time_mix_r)
            k, v, r = self.key(xk), self.value(xk), self.receptance(xr)
            rwkv = torch.sigmoid(r) * wkv(self.time_decay, self.time_first, k.float(), v.float()).to(r)
            return self.output(rwkv)

    class RWKV_ChannelMix(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
            self.time_mix_k = nn.Parameter(torch.full((1, 1, dim), 0.6))
            self.key, self.receptance = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.value = nn.Linear(2 * dim, dim, bias=False)

        def forward(self, x):
            xx = self.time_shift(x)
            xk = x * self.time_mix_k + xx * (1 - self.time_mix_k)
            k = torch.square(torch.relu(self.key(xk)))
            return torch.sigmoid(self.receptance(xk)) * self.value(k)

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.att, self.ffn = RWKV_TimeMix(dim), RWKV_ChannelMix(dim)
            self.lif1, self.lif2 = (
                sj.neuron.MultiStepLIFNode(
                    tau=2.0,
                    surrogate_function=sj.surrogate.ATan(alpha=2.0),
                    backend="torch",
                    v_threshold=1.0,
                )
                for _ in range(2)
            )
            self.dropout = nn.Dropout(0.03)

        def forward(self, x):
            spike = self.lif1(self.att(self.ln1(x)).permute(1, 0, 2)).permute(1, 0, 2)
            x = x + spike
            spike = self.lif2(self.ffn(self.ln2(x)).permute(1, 0, 2)).permute(1, 0, 2)
            x = x + spike
            return self.dropout(x)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(16, width)
            self.blocks = nn.Sequential(Block(width), Block(width))
            self.ln_out, self.head = nn.LayerNorm(width), nn.Linear(width, 16, bias=False)

        def forward(self, idx):
            sj.functional.reset_net(self)
            return self.head(self.ln_out(self.blocks(self.emb(idx))))

    return GPT()


def spike_gpt_loss(model, tokens):
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].reshape(-1, 16).float(), tokens[:, 1:].reshape(-1))


@torch.jit.script
def gated_charge(z, v, current):
    f = torch.sigmoid(z)
    return f * v + (1 - f) * current


@torch.jit.script
def triangle(x, gamma: float):
    return gamma * torch.clamp(1 - x.abs(), min=0.0)


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.ge(0.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * triangle(x, 0.5)


def full_subnet(_sj, width):
    """A gated recurrent cell in scripted functions, states handed on; a mask for sub-bands, unfolded."""

    class GSUCell(nn.Module):
        def __init__(self, inp, hidden):
            super().__init__()
            self.weight_ih, self.weight_hh = (
                nn.Linear(inp, 2 * hidden),
                nn.Linear(hidden, 2 * hidden, bias=False),
            )
            self.norm = nn.BatchNorm1d(2 * hidden)

        def forward(self, x, state):
            v, y = state
            gates = self.norm(self.weight_ih(x) + self.weight_hh(y))
            z, current = gates.chunk(2, 1)
            v = gated_charge(z, v, current)
            y = Triangle.apply(v)
            v = v * (1 - y)
            return y, (v, y)

    class StackedGSU(nn.Module):
        def __init__(self, inp, hidden, layers=2):
            super().__init__()
            self.cells = nn.ModuleList(GSUCell(inp if i == 0 else hidden, hidden) for i in range(layers))
            self.hidden = hidden

        def forward(self, x):
            zeros = x.new_zeros(x.shape[1], self.hidden)
            states = [(zeros, zeros) for _ in self.cells]
            outputs = []
            for frame in x.unbind(0):
                for i, cell in enumerate(self.cells):
                    frame, states[i] = cell(frame, states[i])
                outputs.append(frame)
            return torch.stack(outputs), states

    class Separator(nn.Module):
        def __init__(self):
            super().__init__()
            self.full, self.full_proj = StackedGSU(8, width), nn.Linear(width, 8)
            self.sub, self.sub_proj = StackedGSU(6, width), nn.Linear(width, 2)

        def forward(self, spectrum):
            batch, bands, frames = spectrum.shape
            mean = spectrum.abs().mean(dim=(1, 2), keepdim=True) + 1e-5
            x = spectrum / mean
            full, _ = self.full(x.permute(2, 0, 1))
            full = self.full_proj(full).permute(1, 2, 0)
            padded = F.pad(x.unsqueeze(1), (0, 0, 2, 2), mode="reflect")
            sub = F.unfold(padded, (5, frames)).reshape(batch, 5, frames, bands)
            sub = torch.cat([sub, full.permute(0, 2, 1).unsqueeze(1)], 1)
            sub = sub.permute(0, 3, 1, 2).reshape(batch * bands, 6, frames)
            out, _ = self.sub(sub.permute(2, 0, 1))
            mask = self.sub_proj(out).permute(1, 2, 0).reshape(batch, bands, 2, frames)
            return torch.tanh(mask) * x.unsqueeze(2)

    return Separator()


def speech_transformer(sj, width):
    """0.0.0.0.14: convolutional front end, softmax attention of a mask on spikes, positions added."""

    def lif():
        return sj.neuron.LIFNode(
            tau=2.0,
            v_reset=None,
            surrogate_function=sj.surrogate.Sigmoid(),
            detach_reset=True,
            step_mode="m",
        )

    class Attention(nn.Module):
        def __init__(self, dim, heads=2):
            super().__init__()
            self.heads = heads
            self.qkv, self.norm, self.lif = nn.Linear(dim, 3 * dim), nn.LayerNorm(3 * dim), lif()
            self.proj, self.out_norm, self.out_lif = nn.Linear(dim, dim), nn.LayerNorm(dim), lif()

        def forward(self, x, mask):
            T, B, L, C = x.shape
            qkv = self.lif(self.norm(self.qkv(x)))
            q, k, v = qkv.reshape(T, B, L, 3, self.heads, C // self.heads).permute(3, 0, 1, 4, 2, 5)
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(C // self.heads)
            scores = scores.masked_fill(mask[None, :, None, None, :], -1e4)
            attn = scores.softmax(-1)
            x = (attn @ v).transpose(2, 3).reshape(T, B, L, C)
            return self.out_lif(self.out_norm(self.proj(x)))

    class Encoder(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.attn = Attention(dim)
            self.ffn = nn.Sequential(
                sj.layer.Linear(dim, 2 * dim, step_mode="m"), nn.LayerNorm(2 * dim), lif(),
                nn.Dropout(0.1), sj.layer.Linear(2 * dim, dim, step_mode="m"), nn.LayerNorm(dim), lif(),
            )  # fmt: skip

        def forward(self, x, mask):
            x = x + self.attn(x, mask)
            return x + self.ffn(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.T = 3
            self.front, self.front_norm = nn.Conv1d(6, width, 3, padding=1), nn.BatchNorm1d(width)
            self.lif = lif()
            self.register_buffer(
                "position", torch.sin(torch.arange(512)[:, None] / (1 + torch.arange(width)))
            )
            self.layers = nn.ModuleList(Encoder(width) for _ in range(2))
            self.head = nn.Linear(width, 5)

        def forward(self, x):
            sj.functional.reset_net(self)
            mask = (
                torch.arange(x.shape[-1], device=x.device)
                >= x.shape[-1] - torch.arange(len(x), device=x.device)[:, None]
            )
            x = self.front_norm(self.front(x)).transpose(1, 2) + self.position[: x.shape[-1]]
            x = self.lif(x.unsqueeze(0).repeat(self.T, 1, 1, 1))
            for layer in self.layers:
                x = layer(x, mask)
            return F.log_softmax(self.head(x.mean(0)), -1)

    return Net()


def adaptive_recurrent(_sj, width):
    """Thresholds that adapt, recurrent currents, a handful of states, outputs added over time."""

    class ActFun_adp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            ctx.save_for_backward(input)
            return input.gt(0).float()

        @staticmethod
        def backward(ctx, grad_output):
            (input,) = ctx.saved_tensors
            sigma = 0.5
            temp = torch.exp(-(input**2) / (2 * sigma**2)) / math.sqrt(2 * math.pi) / sigma
            return grad_output * temp.float() * 0.5

    def mem_update_adp(inputs, mem, spike, tau_adp, b, tau_m, dt=1):
        alpha = torch.exp(-1.0 * dt / tau_m)
        ro = torch.exp(-1.0 * dt / tau_adp)
        b = ro * b + (1 - ro) * spike
        B = 0.1 + 1.8 * b
        mem = mem * alpha + (1 - alpha) * inputs - B * spike * dt
        spike = ActFun_adp.apply(mem - B)
        return mem, spike, B, b

    class RNN_custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.i2h, self.h2h, self.h2o = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 5)
            self.tau_adp, self.tau_m = (
                nn.Parameter(torch.full((width,), 20.0)),
                nn.Parameter(torch.full((width,), 5.0)),
            )
            self.tau_m_o = nn.Parameter(torch.full((5,), 3.0))

        def forward(self, input):
            T, batch, _ = input.shape
            mem = torch.rand(batch, width, device=input.device)
            spike, b = torch.zeros_like(mem), torch.full_like(mem, 0.1)
            out_mem = torch.zeros(batch, 5, device=input.device)
            output = torch.zeros(batch, 5, device=input.device)
            for t in range(T):
                current = self.i2h(input[t].float()) + self.h2h(spike)
                mem, spike, _, b = mem_update_adp(current, mem, spike, self.tau_adp, b, self.tau_m)
                alpha = torch.exp(-1.0 / self.tau_m_o)
                out_mem = out_mem * alpha + (1 - alpha) * self.h2o(spike)
                if t > 1:
                    output = output + F.softmax(out_mem, dim=1)
            return output

    return RNN_custom()


FAMILIES = (
    Family("SNN-delays", snn_delays, "0.0.0.0.14", (6, (9, 3, 6)), (256, (100, 80, 6)), snn_delays_loss),
    Family("SpikeGPT", spike_gpt, "0.0.0.0.12", (6, (2, 7)), (128, (20, 128)), spike_gpt_loss, classes=16),
    Family("Spiking-FullSubNet", full_subnet, None, (6, (2, 8, 7)), (128, (20, 8, 60)), scripted=True),
    Family("Speech transformer", speech_transformer, "0.0.0.0.14", (6, (2, 6, 9)), (128, (12, 6, 100))),
    Family("Adaptive recurrent", adaptive_recurrent, None, (6, (8, 3, 6)), (256, (100, 176, 6))),
)
