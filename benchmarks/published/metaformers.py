"""Later transformers: Spike-driven V2 and V3, SpikingResformer.

Source: Yao et al., ICLR 2024 (V2); Yao et al., TPAMI 2025 (V3, integer spikes in training); Shi et al.,
CVPR 2024 (SpikingResformer).
"""

from __future__ import annotations

import torch
from torch import nn

from .family import Family


def spike_driven_v2(sj, width):
    """Re-parametrized convolutions, separable ones, batch norm that pads; membranes as shortcuts."""

    def lif(**settings):
        return sj.neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch", **settings)

    class BNAndPadLayer(nn.Module):
        def __init__(self, pad_pixels, num_features):
            super().__init__()
            self.bn, self.pad_pixels = nn.BatchNorm2d(num_features), pad_pixels

        def forward(self, input):
            output = self.bn(input)
            if self.pad_pixels > 0:
                pad_values = (
                    self.bn.bias.detach()
                    - self.bn.running_mean
                    * self.bn.weight.detach()
                    / torch.sqrt(self.bn.running_var + self.bn.eps)
                )
                output = nn.functional.pad(output, [self.pad_pixels] * 4)
                pad_values = pad_values.view(1, -1, 1, 1)
                output[:, :, 0 : self.pad_pixels, :] = pad_values
                output[:, :, -self.pad_pixels :, :] = pad_values
                output[:, :, :, 0 : self.pad_pixels] = pad_values
                output[:, :, :, -self.pad_pixels :] = pad_values
            return output

    class RepConv(nn.Module):
        def __init__(self, in_channel, out_channel):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(in_channel, in_channel, 1, bias=False),
                BNAndPadLayer(1, in_channel),
                nn.Sequential(
                    nn.Conv2d(in_channel, in_channel, 3, groups=in_channel, bias=False),
                    nn.Conv2d(in_channel, out_channel, 1, bias=False),
                    nn.BatchNorm2d(out_channel),
                ),
            )

        def forward(self, x):
            return self.body(x)

    class SepConv(nn.Module):
        def __init__(self, dim, expansion=2):
            super().__init__()
            med = dim * expansion
            self.lif1, self.pwconv1, self.bn1 = (
                lif(),
                nn.Conv2d(dim, med, 1, bias=False),
                nn.BatchNorm2d(med),
            )
            self.lif2, self.dwconv = lif(), nn.Conv2d(med, med, 7, padding=3, groups=med, bias=False)
            self.pwconv2, self.bn2 = nn.Conv2d(med, dim, 1, bias=False), nn.BatchNorm2d(dim)

        def forward(self, x):
            T, B, _, H, W = x.shape
            x = self.lif1(x)
            x = self.bn1(self.pwconv1(x.flatten(0, 1))).reshape(T, B, -1, H, W)
            x = self.lif2(x)
            x = self.dwconv(x.flatten(0, 1))
            return self.bn2(self.pwconv2(x)).reshape(T, B, -1, H, W)

    class MS_ConvBlock(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.Conv = SepConv(dim)
            self.lif1, self.conv1, self.bn1 = lif(), RepConv(dim, dim * 2), nn.BatchNorm2d(dim * 2)
            self.lif2, self.conv2, self.bn2 = lif(), RepConv(dim * 2, dim), nn.BatchNorm2d(dim)

        def forward(self, x):
            T, B, C, H, W = x.shape
            x = self.Conv(x) + x
            x_feat = x
            x = self.bn1(self.conv1(self.lif1(x).flatten(0, 1))).reshape(T, B, 2 * C, H, W)
            x = self.bn2(self.conv2(self.lif2(x).flatten(0, 1))).reshape(T, B, C, H, W)
            return x_feat + x

    class MS_Attention_RepConv_qkv_id(nn.Module):
        def __init__(self, dim, num_heads=2):
            super().__init__()
            self.num_heads, self.scale = num_heads, 0.125
            self.head_lif = lif()
            for part in "qkv":
                setattr(self, f"{part}_conv", nn.Sequential(RepConv(dim, dim), nn.BatchNorm2d(dim)))
                setattr(self, f"{part}_lif", lif())
            self.attn_lif = lif(v_threshold=0.5)
            self.proj_conv = nn.Sequential(RepConv(dim, dim), nn.BatchNorm2d(dim))

        def forward(self, x):
            T, B, C, H, W = x.shape
            N = H * W
            x = self.head_lif(x).flatten(0, 1)
            parts = []
            for part in "qkv":
                out = getattr(self, f"{part}_conv")(x).reshape(T, B, C, H, W)
                out = getattr(self, f"{part}_lif")(out).flatten(3).transpose(-1, -2)
                out = out.reshape(T, B, N, self.num_heads, C // self.num_heads)
                parts.append(out.permute(0, 1, 3, 2, 4).contiguous())
            q, k, v = parts
            x = q @ (k.transpose(-2, -1) @ v) * self.scale
            x = x.transpose(3, 4).reshape(T, B, C, N).contiguous()
            x = self.attn_lif(x).reshape(T, B, C, H, W)
            return self.proj_conv(x.flatten(0, 1)).reshape(T, B, C, H, W)

    class MS_Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.attn = MS_Attention_RepConv_qkv_id(dim)
            self.fc1_lif, self.fc1_conv, self.fc1_bn = (
                lif(),
                nn.Conv1d(dim, 2 * dim, 1),
                nn.BatchNorm1d(2 * dim),
            )
            self.fc2_lif, self.fc2_conv, self.fc2_bn = (
                lif(),
                nn.Conv1d(2 * dim, dim, 1),
                nn.BatchNorm1d(dim),
            )

        def mlp(self, x):
            T, B, C, H, W = x.shape
            x = self.fc1_lif(x.flatten(3))
            x = self.fc1_bn(self.fc1_conv(x.flatten(0, 1))).reshape(T, B, -1, H * W).contiguous()
            x = self.fc2_lif(x)
            return self.fc2_bn(self.fc2_conv(x.flatten(0, 1))).reshape(T, B, C, H, W).contiguous()

        def forward(self, x):
            x = x + self.attn(x)
            return x + self.mlp(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.T = 4
            self.encode_conv, self.encode_bn = (
                nn.Conv2d(3, width, 7, 2, 3, bias=False),
                nn.BatchNorm2d(width),
            )
            self.ConvBlock = nn.ModuleList([MS_ConvBlock(width)])
            self.block = nn.ModuleList([MS_Block(width) for _ in range(2)])
            self.lif, self.head = lif(), nn.Linear(width, 10)

        def forward(self, x):
            sj.functional.reset_net(self)
            x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
            T, B = x.shape[:2]
            x = self.encode_bn(self.encode_conv(x.flatten(0, 1)))
            x = x.reshape(T, B, *x.shape[1:]).contiguous()
            for blk in (*self.ConvBlock, *self.block):
                x = blk(x)
            x = x.flatten(3).mean(3)
            return self.head(self.lif(x)).mean(0)

    return Net()


class Quant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, i, min_value, max_value):
        ctx.min, ctx.max = min_value, max_value
        ctx.save_for_backward(i)
        return torch.round(torch.clamp(i, min=min_value, max=max_value))

    @staticmethod
    def backward(ctx, grad_output):
        grad_input = grad_output.clone()
        (i,) = ctx.saved_tensors
        grad_input[i < ctx.min] = 0
        grad_input[i > ctx.max] = 0
        return grad_input, None, None


class Multispike(nn.Module):
    def __init__(self, lens=4):
        super().__init__()
        self.lens, self.spike = lens, Quant

    def forward(self, inputs):
        return self.spike.apply(4 * inputs, 0, self.lens) / 4.0


def spike_driven_v3(_sj, width):
    """Integer spikes of one time step, layer scales, drop path."""

    class DropPath(nn.Module):
        def __init__(self, drop_prob):
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x):
            if not self.training:
                return x
            keep = 1 - self.drop_prob
            mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
            mask.div_(keep)
            return x * mask

    class MS_Attention_linear(nn.Module):
        def __init__(self, dim, num_heads=2):
            super().__init__()
            self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
            self.head_spike = Multispike()
            for part in "qkv":
                setattr(
                    self,
                    f"{part}_conv",
                    nn.Sequential(nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim)),
                )
                setattr(self, f"{part}_spike", Multispike())
            self.attn_spike = Multispike()
            self.proj_conv = nn.Sequential(nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim))

        def forward(self, x):
            B, C, N = x.shape
            x = self.head_spike(x)
            q, k, v = (
                getattr(self, f"{part}_spike")(getattr(self, f"{part}_conv")(x))
                .transpose(-1, -2)
                .reshape(B, N, self.num_heads, C // self.num_heads)
                .permute(0, 2, 1, 3)
                .contiguous()
                for part in "qkv"
            )
            x = q @ k.transpose(-2, -1)
            x = (x @ v) * (self.scale * 2)
            x = x.transpose(2, 3).reshape(B, C, N).contiguous()
            return self.proj_conv(self.attn_spike(x))

    class MS_Block(nn.Module):
        def __init__(self, dim, init_values=0.5, drop_path=0.2):
            super().__init__()
            self.attn = MS_Attention_linear(dim)
            self.mlp = nn.Sequential(
                Multispike(),
                nn.Conv1d(dim, 2 * dim, 1),
                nn.BatchNorm1d(2 * dim),
                Multispike(),
                nn.Conv1d(2 * dim, dim, 1),
                nn.BatchNorm1d(dim),
            )
            self.drop_path = DropPath(drop_path)
            self.layer_scale1 = nn.Parameter(init_values * torch.ones(dim))
            self.layer_scale2 = nn.Parameter(init_values * torch.ones(dim))

        def forward(self, x):
            x = x + self.drop_path(self.attn(x) * self.layer_scale1.unsqueeze(0).unsqueeze(-1))
            return x + self.drop_path(self.mlp(x) * self.layer_scale2.unsqueeze(0).unsqueeze(-1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
            self.block = nn.ModuleList([MS_Block(width) for _ in range(3)])
            self.spike, self.head = Multispike(), nn.Linear(width, 10)

        def forward(self, x):
            x = self.encode(x).flatten(2)
            for blk in self.block:
                x = blk(x)
            return self.head(self.spike(x).mean(-1))

    return Net()


def spiking_resformer(sj, width):
    """0.0.0.0.14: attention by strided convolutions, its scale from firing rates that are buffers."""

    def lif():
        return sj.neuron.LIFNode(
            tau=2.0,
            detach_reset=True,
            step_mode="m",
            surrogate_function=sj.surrogate.Sigmoid(),
            backend="torch",
        )

    class BN(nn.Module):
        def __init__(self, num_features):
            super().__init__()
            self.bn = nn.BatchNorm2d(num_features)

        def forward(self, x):
            return sj.functional.seq_to_ann_forward(x, self.bn)

    class DSSA(nn.Module):
        def __init__(self, dim, num_heads=2, patch=2, lenth=16):
            super().__init__()
            self.dim, self.num_heads, self.lenth = dim, num_heads, lenth
            self.register_buffer("firing_rate_x", torch.zeros(1, 1, num_heads, 1, 1))
            self.register_buffer("firing_rate_attn", torch.zeros(1, 1, num_heads, 1, 1))
            self.init_firing_rate_x, self.momentum = False, 0.999
            self.activation_in, self.activation_attn, self.activation_out = lif(), lif(), lif()
            self.W = sj.layer.Conv2d(dim, dim * 2, patch, patch, bias=False, step_mode="m")
            self.norm = BN(dim * 2)
            self.Wproj, self.norm_proj = sj.layer.Conv2d(dim, dim, 1, bias=False, step_mode="m"), BN(dim)

        def forward(self, x):
            T, B, C, H, W = x.shape
            x_feat = x.clone()
            x = self.activation_in(x)
            y = self.norm(self.W(x))
            y = y.reshape(T, B, self.num_heads, 2 * C // self.num_heads, -1)
            y1, y2 = y[:, :, :, : C // self.num_heads, :], y[:, :, :, C // self.num_heads :, :]
            x = x.reshape(T, B, self.num_heads, C // self.num_heads, -1)
            if self.training:
                rate = x.detach().mean((0, 1, 3, 4), keepdim=True)
                if not self.init_firing_rate_x:
                    self.firing_rate_x, self.init_firing_rate_x = rate, True
                self.firing_rate_x = self.firing_rate_x * self.momentum + rate * (1 - self.momentum)
            scale1 = 1.0 / torch.sqrt(self.firing_rate_x.clamp(min=0.01) * (self.dim // self.num_heads))
            attn = torch.matmul(y1.transpose(-1, -2), x) * scale1
            attn = self.activation_attn(attn)
            if self.training:
                rate = attn.detach().mean((0, 1, 3, 4), keepdim=True)
                self.firing_rate_attn = self.firing_rate_attn * self.momentum + rate * (1 - self.momentum)
            scale2 = 1.0 / torch.sqrt(self.firing_rate_attn.clamp(min=0.01) * self.lenth)
            out = torch.matmul(y2, attn) * scale2
            out = out.reshape(T, B, C, H, W)
            out = self.activation_out(out)
            return self.norm_proj(self.Wproj(out)) + x_feat

    class GWFFN(nn.Module):
        def __init__(self, dim, group=4):
            super().__init__()
            inner = 2 * dim
            self.up = nn.Sequential(
                lif(), sj.layer.Conv2d(dim, inner, 1, bias=False, step_mode="m"), BN(inner)
            )
            self.conv = nn.ModuleList(
                [
                    nn.Sequential(
                        lif(),
                        sj.layer.Conv2d(
                            inner, inner, 3, padding=1, groups=inner // group, bias=False, step_mode="m"
                        ),
                        BN(inner),
                    )
                ]
            )
            self.down = nn.Sequential(
                lif(), sj.layer.Conv2d(inner, dim, 1, bias=False, step_mode="m"), BN(dim)
            )

        def forward(self, x):
            x_feat = x.clone()
            x = self.up(x)
            for conv in self.conv:
                x_feat2 = x.clone()
                x = conv(x) + x_feat2
            return self.down(x) + x_feat

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.prologue = nn.Sequential(
                sj.layer.Conv2d(2, width, 3, 2, 1, bias=False, step_mode="m"), BN(width)
            )
            self.layers = nn.Sequential(DSSA(width), GWFFN(width), DSSA(width), GWFFN(width))
            self.avgpool = sj.layer.AdaptiveAvgPool2d((1, 1), step_mode="m")
            self.classifier = sj.layer.Linear(width, 10, step_mode="m")

        def forward(self, x):
            sj.functional.reset_net(self)
            x = self.layers(self.prologue(x))
            return self.classifier(torch.flatten(self.avgpool(x), 2)).mean(0)

    return Net()


FAMILIES = (
    Family(
        "Spike-driven Transformer V2",
        spike_driven_v2,
        "0.0.0.0.12",
        (8, (2, 3, 12, 12)),
        (64, (4, 3, 64, 64)),
    ),
    Family("Spike-driven Transformer V3", spike_driven_v3, None, (8, (3, 3, 8, 8)), (128, (16, 3, 32, 32))),
    Family(
        "SpikingResformer", spiking_resformer, "0.0.0.0.14", (8, (3, 2, 2, 16, 16)), (64, (4, 4, 2, 64, 64))
    ),
)
