"""QKFormer on SpikingJelly 0.0.0.0.12: a hierarchy of attention between queries and keys.

Source: Zhou et al., NeurIPS 2024.
"""

from __future__ import annotations

import torch
from torch import nn

from .family import Family


def qkformer(sj, width):
    """Attention of a sum of queries on keys; embedding halves that fire and are added."""

    def lif(**settings):
        return sj.neuron.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="torch", **settings)

    class Token_QK_Attention(nn.Module):
        def __init__(self, dim, num_heads=2):
            super().__init__()
            self.num_heads = num_heads
            for part in "qk":
                setattr(self, f"{part}_conv", nn.Conv1d(dim, dim, 1, bias=False))
                setattr(self, f"{part}_bn", nn.BatchNorm1d(dim))
                setattr(self, f"{part}_lif", lif())
            self.attn_lif = lif(v_threshold=0.5)
            self.proj_conv, self.proj_bn, self.proj_lif = nn.Conv1d(dim, dim, 1), nn.BatchNorm1d(dim), lif()

        def forward(self, x):
            T, B, C, H, W = x.shape
            x = x.flatten(3)
            N = x.shape[-1]
            x_for_qkv = x.flatten(0, 1)
            parts = []
            for part in "qk":
                out = getattr(self, f"{part}_bn")(getattr(self, f"{part}_conv")(x_for_qkv))
                out = getattr(self, f"{part}_lif")(out.reshape(T, B, C, N))
                parts.append(out.unsqueeze(2).reshape(T, B, self.num_heads, C // self.num_heads, N))
            q, k = parts
            q = torch.sum(q, dim=3, keepdim=True)
            attn = self.attn_lif(q)
            x = torch.mul(attn, k)
            x = x.flatten(2, 3)
            x = self.proj_bn(self.proj_conv(x.flatten(0, 1))).reshape(T, B, C, H, W)
            return self.proj_lif(x)

    class MLP(nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            self.mlp1_conv, self.mlp1_bn, self.mlp1_lif = (
                nn.Conv2d(dim, hidden, 1),
                nn.BatchNorm2d(hidden),
                lif(),
            )
            self.mlp2_conv, self.mlp2_bn, self.mlp2_lif = (
                nn.Conv2d(hidden, dim, 1),
                nn.BatchNorm2d(dim),
                lif(),
            )
            self.c_hidden = hidden

        def forward(self, x):
            T, B, C, H, W = x.shape
            x = self.mlp1_bn(self.mlp1_conv(x.flatten(0, 1))).reshape(T, B, self.c_hidden, H, W)
            x = self.mlp1_lif(x)
            x = self.mlp2_bn(self.mlp2_conv(x.flatten(0, 1))).reshape(T, B, C, H, W)
            return self.mlp2_lif(x)

    class TokenSpikingTransformer(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.tssa, self.mlp = Token_QK_Attention(dim), MLP(dim, 4 * dim)

        def forward(self, x):
            x = x + self.tssa(x)
            x = x + self.mlp(x)
            return x

    class PatchEmbed(nn.Module):
        def __init__(self, inp, dim):
            super().__init__()
            self.proj_conv, self.proj_bn = (
                nn.Conv2d(inp, dim, 3, padding=1, bias=False),
                nn.BatchNorm2d(dim),
            )
            self.proj_maxpool, self.proj_lif = nn.MaxPool2d(3, 2, 1), lif()
            self.proj_res_conv = nn.Conv2d(inp, dim, 1, 2, bias=False)
            self.proj_res_bn, self.proj_res_lif = nn.BatchNorm2d(dim), lif()

        def forward(self, x):
            T, B, _, H, W = x.shape
            x = x.flatten(0, 1)
            x_feat = x
            x = self.proj_maxpool(self.proj_bn(self.proj_conv(x)))
            x = self.proj_lif(x.reshape(T, B, -1, H // 2, W // 2).contiguous())
            x_feat = self.proj_res_bn(self.proj_res_conv(x_feat))
            x_feat = self.proj_res_lif(x_feat.reshape(T, B, -1, H // 2, W // 2).contiguous())
            return x + x_feat

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed1, self.patch_embed2 = PatchEmbed(2, width), PatchEmbed(width, 2 * width)
            self.stage1 = nn.ModuleList([TokenSpikingTransformer(width)])
            self.stage2 = nn.ModuleList([TokenSpikingTransformer(2 * width) for _ in range(2)])
            self.head = nn.Linear(2 * width, 10)

        def forward(self, x):
            sj.functional.reset_net(self)
            x = self.patch_embed1(x)
            for blk in self.stage1:
                x = blk(x)
            x = self.patch_embed2(x)
            for blk in self.stage2:
                x = blk(x)
            return self.head(x.flatten(3).mean(3).mean(0))

    return Net()


FAMILIES = (Family("QKFormer", qkformer, "0.0.0.0.12", (8, (4, 2, 2, 8, 8)), (96, (4, 4, 2, 48, 48))),)
