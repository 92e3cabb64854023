"""Networks with an answer for each place: EMS-YOLO, SpikeYOLO, StereoSpike.

Source: Su et al., ICCV 2023 (EMS-YOLO); Luo et al., ECCV 2024 (SpikeYOLO); Rancon et al., IEEE Access 2022
(StereoSpike).
"""

from __future__ import annotations

import torch
from torch import nn

from .family import Family
from .resnets import Snn_Conv2d, batch_norm_2d, mem_update


def ems_yolo(_sj, width):
    """Membranes as shortcuts through pooling and concatenation; heads at two scales, permuted views."""

    class Concat_res2(nn.Module):
        def __init__(self, in_channels, out_channels, stride=2):
            super().__init__()
            self.residual_function = nn.Sequential(
                mem_update(),
                Snn_Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
                batch_norm_2d(out_channels),
                mem_update(),
                Snn_Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                batch_norm_2d(out_channels, 0.1),
            )
            self.pools = nn.MaxPool2d(stride, stride)
            self.shortcut = nn.Sequential(
                mem_update(),
                Snn_Conv2d(in_channels, out_channels - in_channels, 1, stride=1, bias=False),
                batch_norm_2d(out_channels - in_channels),
            )

        def forward(self, x):
            temp = self.residual_function(x)
            pooled = torch.zeros(*x.shape[:3], x.shape[3] // 2, x.shape[4] // 2, device=x.device)
            for i in range(x.shape[0]):
                pooled[i] = self.pools(x[i])
            return torch.cat((self.shortcut(pooled), pooled), dim=2) + temp

    class BasicBlock_ms(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.residual_function = nn.Sequential(
                mem_update(),
                Snn_Conv2d(channels, channels, 3, padding=1, bias=False),
                batch_norm_2d(channels),
                mem_update(),
                Snn_Conv2d(channels, channels, 3, padding=1, bias=False),
                batch_norm_2d(channels, 0.1),
            )

        def forward(self, x):
            return self.residual_function(x) + x

    class Detect(nn.Module):
        stride = None

        def __init__(self, nc, anchors, ch):
            super().__init__()
            self.no, self.na = nc + 5, anchors
            self.m = nn.ModuleList(nn.Conv2d(x, self.no * self.na, 1) for x in ch)

        def forward(self, x):
            for i, head in enumerate(self.m):
                x[i] = head(x[i].mean(0))
                bs, _, ny, nx = x[i].shape
                x[i] = x[i].view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(Snn_Conv2d(3, width, 3, 2, 1, bias=False), batch_norm_2d(width))
            self.block1 = BasicBlock_ms(width)
            self.down1 = Concat_res2(width, 2 * width)
            self.block2 = BasicBlock_ms(2 * width)
            self.down2 = Concat_res2(2 * width, 4 * width)
            self.last, self.up = mem_update(), nn.Upsample(scale_factor=2, mode="nearest")
            self.lateral = nn.Sequential(
                mem_update(), Snn_Conv2d(6 * width, 2 * width, 1, bias=False), batch_norm_2d(2 * width)
            )
            self.detect = Detect(3, 2, (2 * width, 4 * width))

        def forward(self, x):
            input = torch.zeros(3, *x.size(), device=x.device)
            for i in range(3):
                input[i] = x
            y = []
            x = self.block1(self.stem(input))
            x = self.block2(self.down1(x))
            y.append(x)
            x = self.down2(x)
            y.append(x)
            up = torch.stack([self.up(step) for step in self.last(x)])
            small = self.lateral(torch.cat([up, y[0]], 2))
            return self.detect([small, x])

    return Model()


class MultiSpike4(nn.Module):
    """Whole numbers up to four, and a gradient inside the range."""

    class quant4(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            ctx.save_for_backward(input)
            return torch.round(torch.clamp(input, min=0, max=4))

        @staticmethod
        def backward(ctx, grad_output):
            (input,) = ctx.saved_tensors
            grad_input = grad_output.clone()
            grad_input[input < 0] = 0
            grad_input[input > 4] = 0
            return grad_input

    def forward(self, x):
        return self.quant4.apply(x)


class integer_mem_update(nn.Module):
    def __init__(self):
        super().__init__()
        self.qtrick = MultiSpike4()

    def forward(self, x):
        spike = torch.zeros_like(x[0]).to(x.device)
        output = torch.zeros_like(x)
        mem_old = 0
        for i in range(x.shape[0]):
            mem = (mem_old - spike.detach()) * 0.25 + x[i] if i >= 1 else x[i]
            spike = self.qtrick(mem)
            mem_old = mem.clone()
            output[i] = spike
        return output


def spike_yolo(_sj, width):
    """Integer spikes, convolutions over flattened steps, concatenations, a head of distributions."""

    def conv(inp, out, kernel=3, stride=1, groups=1):
        class MS_StandardConv(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
                self.bn, self.lif = nn.BatchNorm2d(out), integer_mem_update()

            def forward(self, x):
                T, B = x.shape[:2]
                x = self.lif(x)
                x = self.bn(self.conv(x.flatten(0, 1)))
                return x.reshape(T, B, *x.shape[1:])

        return MS_StandardConv()

    class MS_AllConvBlock(nn.Module):
        def __init__(self, dim, mlp_ratio=2):
            super().__init__()
            self.sep = nn.Sequential(conv(dim, 2 * dim, 1), conv(2 * dim, 2 * dim, 7, groups=2 * dim))
            self.back = conv(2 * dim, dim, 1)
            self.conv1, self.conv2 = conv(dim, mlp_ratio * dim), conv(mlp_ratio * dim, dim)

        def forward(self, x):
            x = self.back(self.sep(x)) + x
            x_feat = x
            return self.conv2(self.conv1(x)) + x_feat

    class DFL(nn.Module):
        def __init__(self, c1=4):
            super().__init__()
            self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
            self.conv.weight.data[:] = nn.Parameter(torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1))
            self.c1 = c1

        def forward(self, x):
            b, _, a = x.shape
            return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width))
            self.block1, self.down1 = MS_AllConvBlock(width), conv(width, 2 * width, stride=2)
            self.block2 = MS_AllConvBlock(2 * width)
            self.up, self.neck = nn.Upsample(scale_factor=2, mode="nearest"), conv(3 * width, width)
            self.box, self.cls, self.dfl = conv(width, 16, 1), conv(width, 3, 1), DFL()

        def forward(self, x):
            x = x.unsqueeze(0).repeat(2, 1, 1, 1, 1)
            T, B = x.shape[:2]
            x = self.stem(x.flatten(0, 1))
            p1 = self.block1(x.reshape(T, B, *x.shape[1:]))
            p2 = self.block2(self.down1(p1))
            up = self.up(p2.flatten(0, 1))
            x = self.neck(torch.cat([up.reshape(T, B, *up.shape[1:]), p1], 2))
            boxes, classes = self.box(x).mean(0).flatten(2), self.cls(x).mean(0).flatten(2)
            return self.dfl(boxes), classes

    return Model()


def stereo_spike(sj, width):
    """An encoder and decoder stepped once; output neurons never fire, their membranes are the depth."""

    def node():
        return sj.neuron.ParametricLIFNode(
            init_tau=2.0,
            v_threshold=1.0,
            v_reset=0.0,
            detach_reset=True,
            surrogate_function=sj.surrogate.ATan(),
        )

    class MultiplyBy(nn.Module):
        def __init__(self, scale_value=15.0):
            super().__init__()
            self.scale_value = nn.Parameter(torch.tensor([scale_value]))

        def forward(self, input):
            return torch.mul(input, self.scale_value)

    class NNConvUpsampling(nn.Module):
        def __init__(self, inp, out, up_size):
            super().__init__()
            self.up = nn.Sequential(
                nn.UpsamplingNearest2d(size=up_size),
                nn.Conv2d(inp, out, 3, padding=1, bias=False),
                MultiplyBy(),
            )

        def forward(self, x):
            return self.up(x)

    class SEWResBlock(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv1 = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), MultiplyBy()
            )
            self.sn1 = node()
            self.conv2 = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), MultiplyBy()
            )
            self.sn2 = node()

        def forward(self, x):
            identity = x
            out = self.sn1(self.conv1(x))
            return self.sn2(self.conv2(out)) + identity

    class Net(nn.Module):
        def __init__(self, size=8 if width < 16 else 64):
            super().__init__()

            def down(inp, out, stride):
                return nn.Sequential(nn.Conv2d(inp, out, 5, stride, 2, bias=False), MultiplyBy(), node())

            self.bottom, self.conv1 = down(4, width, 1), down(width, 2 * width, 2)
            self.conv2 = down(2 * width, 4 * width, 2)
            self.bottleneck = nn.Sequential(SEWResBlock(4 * width), SEWResBlock(4 * width))
            self.deconv2 = nn.Sequential(NNConvUpsampling(4 * width, 2 * width, size // 2), node())
            self.deconv1 = nn.Sequential(NNConvUpsampling(2 * width, width, size), node())
            self.predict_depth2 = NNConvUpsampling(2 * width, 1, size)
            self.predict_depth1 = NNConvUpsampling(width, 1, size)
            self.Ineurons = sj.neuron.IFNode(
                v_threshold=float("inf"), v_reset=0.0, surrogate_function=sj.surrogate.ATan()
            )

        def forward(self, x):
            sj.functional.reset_net(self)
            frame = x[:, 0]
            out_bottom = self.bottom(frame)
            out_conv1 = self.conv1(out_bottom)
            out_conv2 = self.conv2(out_conv1)
            out_rconv = self.bottleneck(out_conv2)
            out_add2 = self.deconv2(out_rconv) + out_conv1
            self.Ineurons(self.predict_depth2(out_add2))
            depth2 = self.Ineurons.v
            out_add1 = self.deconv1(out_add2) + out_bottom
            self.Ineurons(self.predict_depth1(out_add1))
            depth1 = self.Ineurons.v
            return [depth1, depth2], [out_rconv, out_add2.mean(1), out_add1]

    return Net()


def stereo_spike_loss(model, x):
    """Depth at two scales, with gradients of the picture; and a price for spikes."""
    depths, spikes = model(x)
    truth = torch.linspace(0, 1, depths[0].numel(), device=x.device).view(depths[0].shape)
    loss = 0.0
    for depth in depths:
        delta = depth.float() - truth
        loss = loss + (delta**2).mean() - delta.mean() ** 2
        loss = loss + (delta[..., 1:] - delta[..., :-1]).abs().mean()
    return loss + 1e-3 * sum((0.5 * one**2).mean() for one in spikes)


FAMILIES = (
    Family("EMS-YOLO", ems_yolo, None, (4, (2, 3, 16, 16)), (48, (4, 3, 96, 96))),
    Family("SpikeYOLO", spike_yolo, None, (4, (2, 3, 16, 16)), (32, (4, 3, 96, 96))),
    Family(
        "StereoSpike", stereo_spike, "0.0.0.0.12", (4, (2, 1, 4, 8, 8)), (32, (8, 1, 4, 64, 64)),
        stereo_spike_loss,
    ),
)  # fmt: skip
