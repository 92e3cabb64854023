"""Spiking transformers on SpikingJelly 0.0.0.0.12: Spikformer, Spikingformer, Spike-driven.

Source: Zhou et al., ICLR 2023 (Spikformer); Zhou et al., arXiv 2304.11954 (Spikingformer); Yao et al.,
NeurIPS 2023 (Spike-driven Transformer).
"""

from __future__ import annotations

from torch import nn

from .family import Family


def spikformer(sj, width):
    """`x = x + attn(x)`, tokens [T, N, L, C], linear layers with batch norm over the channels."""

    def lif(**settings):
        return sj.neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch", **settings)

    class MLP(nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            self.fc1_linear, self.fc1_bn, self.fc1_lif = (
                nn.Linear(dim, hidden),
                nn.BatchNorm1d(hidden),
                lif(),
            )
            self.fc2_linear, self.fc2_bn, self.fc2_lif = nn.Linear(hidden, dim), nn.BatchNorm1d(dim), lif()
            self.c_hidden, self.c_output = hidden, dim

        def forward(self, x):
            T, B, N, C = x.shape
            x_ = x.flatten(0, 1)
            x = self.fc1_linear(x_)
            x = self.fc1_bn(x.transpose(-1, -2)).transpose(-1, -2)
            x = x.reshape(T, B, N, self.c_hidden).contiguous()
            x = self.fc1_lif(x)
            x = self.fc2_linear(x.flatten(0, 1))
            x = self.fc2_bn(x.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C).contiguous()
            return self.fc2_lif(x)

    class SSA(nn.Module):
        def __init__(self, dim, num_heads=2):
            super().__init__()
            self.dim, self.num_heads, self.scale = dim, num_heads, 0.25
            for part in "qkv":
                setattr(self, f"{part}_linear", nn.Linear(dim, dim))
                setattr(self, f"{part}_bn", nn.BatchNorm1d(dim))
                setattr(self, f"{part}_lif", lif())
            self.attn_lif = lif(v_threshold=0.5)
            self.proj_linear, self.proj_bn, self.proj_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()

        def _heads(self, x, part):
            T, B, N, C = x.shape
            out = getattr(self, f"{part}_linear")(x.flatten(0, 1))
            out = getattr(self, f"{part}_bn")(out.transpose(-1, -2)).transpose(-1, -2)
            out = getattr(self, f"{part}_lif")(out.reshape(T, B, N, C).contiguous())
            out = out.reshape(T, B, N, self.num_heads, C // self.num_heads)
            return out.permute(0, 1, 3, 2, 4).contiguous()

        def forward(self, x):
            T, B, N, C = x.shape
            q, k, v = (self._heads(x, part) for part in "qkv")
            attn = (q @ k.transpose(-2, -1)) * self.scale
            x = attn @ v
            x = x.transpose(2, 3).reshape(T, B, N, C).contiguous()
            x = self.attn_lif(x)
            x = x.flatten(0, 1)
            x = self.proj_bn(self.proj_linear(x).transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C)
            return self.proj_lif(x)

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.attn, self.mlp = SSA(dim), MLP(dim, 2 * dim)

        def forward(self, x):
            x = x + self.attn(x)
            x = x + self.mlp(x)
            return x

    class SPS(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.proj_conv, self.proj_bn = nn.Conv2d(3, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
            self.proj_lif, self.maxpool = lif(), nn.MaxPool2d(3, 2, 1)
            self.rpe_conv, self.rpe_bn = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
            self.rpe_lif = lif()

        def forward(self, x):
            T, B, _, H, W = x.shape
            x = self.proj_bn(self.proj_conv(x.flatten(0, 1))).reshape(T, B, -1, H, W).contiguous()
            x = self.maxpool(self.proj_lif(x).flatten(0, 1).contiguous())
            x_feat = x.reshape(T, B, -1, H // 2, W // 2).contiguous()
            x = self.rpe_bn(self.rpe_conv(x)).reshape(T, B, -1, H // 2, W // 2).contiguous()
            x = self.rpe_lif(x) + x_feat
            return x.flatten(-2).transpose(-1, -2)

    class Spikformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.T = 4
            self.patch_embed = SPS(width)
            self.block = nn.ModuleList([Block(width) for _ in range(2)])
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            sj.functional.reset_net(self)
            x = (x.unsqueeze(0)).repeat(self.T, 1, 1, 1, 1)
            x = self.patch_embed(x)
            for blk in self.block:
                x = blk(x)
            return self.head(x.mean(2).mean(0))

    return Spikformer()


def spikingformer(sj, width):
    """Neurons stand before convolutions, so that shortcuts carry membranes; 1x1 convolutions on tokens."""

    def lif(**settings):
        return sj.neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch", **settings)

    class MLP(nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            self.mlp1_lif, self.mlp1_conv = lif(), nn.Conv2d(dim, hidden, 1)
            self.mlp1_bn = nn.BatchNorm2d(hidden)
            self.mlp2_lif, self.mlp2_conv, self.mlp2_bn = (
                lif(),
                nn.Conv2d(hidden, dim, 1),
                nn.BatchNorm2d(dim),
            )
            self.c_hidden = hidden

        def forward(self, x):
            T, B, C, H, W = x.shape
            x = self.mlp1_lif(x)
            x = self.mlp1_bn(self.mlp1_conv(x.flatten(0, 1))).reshape(T, B, self.c_hidden, H, W)
            x = self.mlp2_lif(x)
            return self.mlp2_bn(self.mlp2_conv(x.flatten(0, 1))).reshape(T, B, C, H, W)

    class Attention(nn.Module):
        def __init__(self, dim, num_heads=2):
            super().__init__()
            self.num_heads = num_heads
            self.proj_lif = lif()
            for part in "qkv":
                setattr(self, f"{part}_conv", nn.Conv1d(dim, dim, 1, bias=False))
                setattr(self, f"{part}_bn", nn.BatchNorm1d(dim))
                setattr(self, f"{part}_lif", lif())
            self.attn_lif = lif(v_threshold=0.5)
            self.proj_conv, self.proj_bn = nn.Conv1d(dim, dim, 1), nn.BatchNorm1d(dim)

        def forward(self, x):
            T, B, C, H, W = x.shape
            x = self.proj_lif(x).flatten(3)
            N = H * W
            x_for_qkv = x.flatten(0, 1)
            parts = []
            for part in "qkv":
                out = getattr(self, f"{part}_conv")(x_for_qkv)
                out = getattr(self, f"{part}_bn")(out).reshape(T, B, C, N)
                out = getattr(self, f"{part}_lif")(out).transpose(-1, -2)
                parts.append(
                    out.reshape(T, B, N, self.num_heads, C // self.num_heads).permute(0, 1, 3, 2, 4)
                )
            q, k, v = parts
            attn = k.transpose(-2, -1) @ v
            x = (q @ attn) * 0.25
            x = x.transpose(3, 4).reshape(T, B, C, N)
            x = self.attn_lif(x).flatten(0, 1)
            return self.proj_bn(self.proj_conv(x)).reshape(T, B, C, H, W)

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.attn, self.mlp = Attention(dim), MLP(dim, 4 * dim)

        def forward(self, x):
            x = x + self.attn(x)
            x = x + self.mlp(x)
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj_conv, self.proj_bn = nn.Conv2d(2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
            self.block = nn.ModuleList([Block(width) for _ in range(2)])
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            sj.functional.reset_net(self)
            T, B = x.shape[:2]
            x = self.proj_bn(self.proj_conv(x.flatten(0, 1)))
            x = x.reshape(T, B, *x.shape[1:])
            for blk in self.block:
                x = blk(x)
            return self.head(x.flatten(3).mean(3)).mean(0)

    return Net()


def spike_driven(sj, width):
    """Attention by masks, hooks that collect activations in a dict, pooled shortcuts of membranes."""

    def lif(**settings):
        return sj.neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch", **settings)

    class MS_MLP_Conv(nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            self.fc1_conv, self.fc1_bn, self.fc1_lif = (
                nn.Conv2d(dim, hidden, 1),
                nn.BatchNorm2d(hidden),
                lif(),
            )
            self.fc2_conv, self.fc2_bn, self.fc2_lif = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim), lif()
            self.c_hidden, self.res = hidden, dim == hidden

        def forward(self, x, hook=None):
            T, B, C, H, W = x.shape
            identity = x
            x = self.fc1_lif(x)
            if hook is not None:
                hook["fc1_lif"] = x.detach()
            x = self.fc1_bn(self.fc1_conv(x.flatten(0, 1))).reshape(T, B, self.c_hidden, H, W).contiguous()
            if self.res:
                x = identity + x
                identity = x
            x = self.fc2_lif(x)
            x = self.fc2_bn(self.fc2_conv(x.flatten(0, 1))).reshape(T, B, C, H, W).contiguous()
            x = x + identity
            return x, hook

    class MS_SSA_Conv(nn.Module):
        def __init__(self, dim, num_heads=2):
            super().__init__()
            self.num_heads = num_heads
            for part in "qkv":
                setattr(self, f"{part}_conv", nn.Conv2d(dim, dim, 1, bias=False))
                setattr(self, f"{part}_bn", nn.BatchNorm2d(dim))
                setattr(self, f"{part}_lif", lif())
            self.talking_heads_lif = lif(v_threshold=0.5)
            self.proj_conv, self.proj_bn = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)
            self.shortcut_lif = lif()

        def forward(self, x, hook=None):
            T, B, C, H, W = x.shape
            identity = x
            N = H * W
            x = self.shortcut_lif(x)
            x_for_qkv = x.flatten(0, 1)
            parts = []
            for part in "qkv":
                out = getattr(self, f"{part}_bn")(getattr(self, f"{part}_conv")(x_for_qkv))
                out = getattr(self, f"{part}_lif")(out.reshape(T, B, C, H, W).contiguous())
                out = out.flatten(3).transpose(-1, -2)
                out = out.reshape(T, B, N, self.num_heads, C // self.num_heads)
                parts.append(out.permute(0, 1, 3, 2, 4).contiguous())
            q, k, v = parts
            kv = k.mul(v)
            kv = kv.sum(dim=-2, keepdim=True)
            kv = self.talking_heads_lif(kv)
            x = q.mul(kv)
            x = x.transpose(3, 4).reshape(T, B, C, H, W).contiguous()
            x = self.proj_bn(self.proj_conv(x.flatten(0, 1))).reshape(T, B, C, H, W).contiguous()
            x = x + identity
            return x, v, hook

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.attn, self.mlp = MS_SSA_Conv(dim), MS_MLP_Conv(dim, 4 * dim)

        def forward(self, x, hook=None):
            x_attn, attn, hook = self.attn(x, hook=hook)
            x, hook = self.mlp(x_attn, hook=hook)
            return x, attn, hook

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj_conv, self.proj_bn = nn.Conv2d(2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
            self.block = nn.ModuleList([Block(width) for _ in range(2)])
            self.head_lif, self.head = lif(), nn.Linear(width, 10)

        def forward(self, x, hook=None):
            sj.functional.reset_net(self)
            T, B = x.shape[:2]
            x = self.proj_bn(self.proj_conv(x.flatten(0, 1)))
            x = x.reshape(T, B, *x.shape[1:]).contiguous()
            for blk in self.block:
                x, _, hook = blk(x, hook=hook)
            x = x.flatten(3).mean(3)
            x = self.head_lif(x)
            x = self.head(x)
            return x.mean(0), hook

    class Trained(nn.Module):
        """Their training script asks for no hook, their evaluation does."""

        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x)[0]

    return Trained()


FAMILIES = (
    Family("Spikformer", spikformer, "0.0.0.0.12", (8, (2, 3, 8, 8)), (128, (4, 3, 32, 32))),
    Family("Spikingformer", spikingformer, "0.0.0.0.12", (8, (4, 2, 2, 8, 8)), (128, (4, 4, 2, 32, 32))),
    Family(
        "Spike-driven Transformer",
        spike_driven,
        "0.0.0.0.12",
        (8, (4, 2, 2, 8, 8)),
        (128, (4, 4, 2, 32, 32)),
    ),
)
