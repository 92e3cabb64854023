"""Residual networks: SEW-ResNet, MS-ResNet, tdBN's ResNet, and the attention of Att-MS-ResNet.

Source: Fang et al., NeurIPS 2021; Hu et al., "Advancing Spiking Neural Networks toward Deep Residual
Learning", TNNLS 2024; Zheng et al., AAAI 2021; Yao et al., "Attention Spiking Neural Networks", TPAMI 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


def sew_resnet(sj, width):
    """A `connect_f`, containers for a batch of steps, `out += identity`, the mean over time."""

    def conv3x3(inp, out, stride=1):
        return sj.layer.SeqToANNContainer(
            nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        )

    def node():
        return sj.neuron.MultiStepParametricLIFNode(
            init_tau=2.0, detach_reset=True, surrogate_function=sj.surrogate.ATan(), backend="torch"
        )

    class BasicBlock(nn.Module):
        def __init__(self, inplanes, planes, stride=1, downsample=None, connect_f="ADD"):
            super().__init__()
            self.connect_f = connect_f
            self.conv1, self.sn1 = conv3x3(inplanes, planes, stride), node()
            self.conv2, self.sn2 = conv3x3(planes, planes), node()
            self.downsample = downsample

        def forward(self, x):
            identity = x
            out = self.sn1(self.conv1(x))
            out = self.sn2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            if self.connect_f == "ADD":
                out += identity
            elif self.connect_f == "AND":
                out *= identity
            elif self.connect_f == "IAND":
                out = identity * (1.0 - out)
            else:
                raise NotImplementedError(self.connect_f)
            return out

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.T = 4
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.sn1 = node()
            self.maxpool = sj.layer.SeqToANNContainer(nn.MaxPool2d(3, 2, 1))
            self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
            shortcut = nn.Sequential(
                sj.layer.SeqToANNContainer(
                    nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
                ),
                node(),
            )
            self.layer2 = nn.Sequential(
                BasicBlock(width, 2 * width, 2, shortcut),
                BasicBlock(2 * width, 2 * width, connect_f="IAND"),
            )
            self.avgpool = sj.layer.SeqToANNContainer(nn.AdaptiveAvgPool2d((1, 1)))
            self.fc = nn.Linear(2 * width, 10)

        def forward(self, x):
            sj.functional.reset_net(self)
            x = self.bn1(self.conv1(x))
            x.unsqueeze_(0)
            x = x.repeat(self.T, 1, 1, 1, 1)
            x = self.maxpool(self.sn1(x))
            x = self.layer2(self.layer1(x))
            x = torch.flatten(self.avgpool(x), 2)
            return self.fc(x.mean(dim=0))

    return ResNet()


thresh, lens, decay = 0.5, 0.5, 0.25


class ActFun(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.gt(thresh).float()

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        temp = abs(input - thresh) < lens
        return grad_output.clone() * temp.float() / (2 * lens)


class mem_update(nn.Module):
    """The neuron of MS-ResNet's repository: a loop that writes its output slice by slice."""

    def __init__(self):
        super().__init__()
        self.actFun = ActFun.apply

    def forward(self, x):
        mem = torch.zeros_like(x[0]).to(x.device)
        spike = torch.zeros_like(x[0]).to(x.device)
        output = torch.zeros_like(x)
        mem_old = 0
        for i in range(x.size(0)):
            if i >= 1:
                mem = mem_old * decay * (1 - spike.detach()) + x[i]
            else:
                mem = x[i]
            spike = self.actFun(mem)
            mem_old = mem.clone()
            output[i] = spike
        return output


class Snn_Conv2d(nn.Conv2d):
    def forward(self, input):
        h = (input.size(3) + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        w = (input.size(4) + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        c1 = torch.zeros(input.size(0), input.size(1), self.out_channels, h, w, device=input.device)
        for i in range(input.size(0)):
            c1[i] = F.conv2d(
                input[i], self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        return c1


class batch_norm_2d(nn.Module):
    """Over [T, N, C, H, W] as three-dimensional batch norm, with the threshold in its weight."""

    def __init__(self, num_features, weight=thresh):
        super().__init__()
        self.bn = nn.BatchNorm3d(num_features)
        nn.init.constant_(self.bn.weight, weight)
        nn.init.zeros_(self.bn.bias)

    def forward(self, input):
        y = input.transpose(0, 2).contiguous().transpose(0, 1).contiguous()
        y = self.bn(y)
        return y.contiguous().transpose(0, 1).contiguous().transpose(0, 2)


def ms_resnet(_sj, width):
    """Neuron before convolution, `output[i] = ...` in neurons and convolutions."""

    class BasicBlock_MS(nn.Module):
        def __init__(self, in_channels, out_channels, stride=1):
            super().__init__()
            self.residual_function = nn.Sequential(
                mem_update(),
                Snn_Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
                batch_norm_2d(out_channels),
                mem_update(),
                Snn_Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                batch_norm_2d(out_channels, 0.1),
            )
            self.shortcut = nn.Sequential()
            if stride != 1 or in_channels != out_channels:
                self.shortcut = nn.Sequential(
                    Snn_Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                    batch_norm_2d(out_channels),
                )

        def forward(self, x):
            return self.residual_function(x) + self.shortcut(x)

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Sequential(Snn_Conv2d(3, width, 3, padding=1, bias=False), batch_norm_2d(width))
            self.mem_update = mem_update()
            self.conv2_x = nn.Sequential(BasicBlock_MS(width, width), BasicBlock_MS(width, width))
            self.conv3_x = nn.Sequential(BasicBlock_MS(width, 2 * width, 2))
            self.fc = nn.Linear(2 * width, 10)

        def forward(self, x):
            input = torch.zeros(4, *x.size(), device=x.device)
            for i in range(4):
                input[i] = x
            output = self.conv3_x(self.conv2_x(self.conv1(input)))
            output = self.mem_update(output)
            output = F.adaptive_avg_pool3d(output, (None, 1, 1))
            output = output.view(output.size()[0], output.size()[1], -1)
            output = output.sum(dim=0) / output.size()[0]
            return self.fc(output)

    return ResNet()


class tdBatchNorm(nn.BatchNorm2d):
    """Batch norm over time and batch whose factor is the threshold, time last: [N, C, H, W, T]."""

    def __init__(self, channel, alpha=1.0):
        super().__init__(channel)
        self.alpha, self.V_th = alpha, 0.5

    def forward(self, input):
        factor = 0.0
        if self.training:
            mean = input.mean([0, 2, 3, 4])
            var = input.var([0, 2, 3, 4], unbiased=False)
            n = input.numel() / input.size(1)
            factor = 0.1
            with torch.no_grad():
                self.running_mean = factor * mean + (1 - factor) * self.running_mean
                self.running_var = factor * var * n / (n - 1) + (1 - factor) * self.running_var
        else:
            mean, var = self.running_mean, self.running_var
        input = (
            self.alpha
            * self.V_th
            * (input - mean[None, :, None, None, None])
            / (torch.sqrt(var[None, :, None, None, None] + self.eps))
        )
        return input * self.weight[None, :, None, None, None] + self.bias[None, :, None, None, None]


class SpikeAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return torch.gt(input, 0.5).float()

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        return grad_output * (torch.abs(input - 0.5) < 0.5).float()


def state_update(u_t_n1, o_t_n1, W_mul_o_t1_n, tau=0.25):
    u_t1_n1 = tau * u_t_n1 * (1 - o_t_n1) + W_mul_o_t1_n
    return u_t1_n1, SpikeAct.apply(u_t1_n1)


class LIFSpike(nn.Module):
    def forward(self, x):
        steps = x.shape[-1]
        u = torch.zeros(x.shape[:-1], device=x.device)
        out = torch.zeros(x.shape, device=x.device)
        for step in range(steps):
            u, out[..., step] = state_update(u, out[..., max(step - 1, 0)], x[..., step])
        return out


class tdLayer(nn.Module):
    def __init__(self, layer, bn=None):
        super().__init__()
        self.layer, self.bn = layer, bn

    def forward(self, x):
        steps = x.shape[-1]
        first = self.layer(x[..., 0])
        out = torch.zeros((*first.shape, steps), device=x.device)
        for step in range(steps):
            out[..., step] = self.layer(x[..., step])
        return out if self.bn is None else self.bn(out)


def tdbn_resnet(_sj, width):
    """Time is the last dimension; a spike is read back from the output that is being written."""

    class BasicBlock(nn.Module):
        def __init__(self, planes):
            super().__init__()
            self.conv1_s = tdLayer(nn.Conv2d(planes, planes, 3, padding=1, bias=False), tdBatchNorm(planes))
            self.conv2_s = tdLayer(
                nn.Conv2d(planes, planes, 3, padding=1, bias=False), tdBatchNorm(planes, 0.5**0.5)
            )
            self.spike1, self.spike2 = LIFSpike(), LIFSpike()

        def forward(self, x):
            out = self.spike1(self.conv1_s(x))
            out = self.conv2_s(out)
            out += x
            return self.spike2(out)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1_s = tdLayer(nn.Conv2d(2, width, 3, padding=1, bias=False), tdBatchNorm(width))
            self.spike = LIFSpike()
            self.blocks = nn.Sequential(BasicBlock(width), BasicBlock(width))
            self.avgpool = tdLayer(nn.AdaptiveAvgPool2d((1, 1)))
            self.fc = tdLayer(nn.Linear(width, 10))

        def forward(self, x):
            x = self.avgpool(self.blocks(self.spike(self.conv1_s(x))))
            x = x.view(x.shape[0], -1, x.shape[-1])
            return torch.sum(self.fc(x), dim=2) / x.shape[-1]

    return Net()


def attention_resnet(_sj, width):
    """MS blocks whose branch is weighted by attention over time and channels, before its addition."""

    class TimeAttention(nn.Module):
        def __init__(self, steps, ratio=2):
            super().__init__()
            self.avg_pool, self.max_pool = nn.AdaptiveAvgPool3d(1), nn.AdaptiveMaxPool3d(1)
            self.shared_mlp = nn.Sequential(
                nn.Conv3d(steps, steps // ratio, 1, bias=False),
                nn.ReLU(),
                nn.Conv3d(steps // ratio, steps, 1, bias=False),
            )
            self.sigmoid = nn.Sigmoid()

        def forward(self, x):
            return self.sigmoid(self.shared_mlp(self.avg_pool(x)) + self.shared_mlp(self.max_pool(x)))

    class CSA(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.ta, self.ca = TimeAttention(4), TimeAttention(channels)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            x = x.permute(1, 0, 2, 3, 4)
            out = self.ta(x) * x
            out = out.transpose(1, 2)
            out = self.ca(out) * out
            return self.relu(out.transpose(1, 2)).permute(1, 0, 2, 3, 4)

    class Block(nn.Module):
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
            self.attention = CSA(channels)

        def forward(self, x):
            return self.attention(self.residual_function(x)) + x

    class Readout(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(width, 10)

        def forward(self, x):
            return self.fc(x.mean((-1, -2))).mean(0)

    stem = nn.Sequential(Snn_Conv2d(2, width, 3, padding=1, bias=False), batch_norm_2d(width))
    return nn.Sequential(*stem, Block(width), Block(width), mem_update(), Readout())


FAMILIES = (
    Family("SEW-ResNet", sew_resnet, "0.0.0.0.12", (4, (2, 3, 8, 8)), (64, (16, 3, 64, 64))),
    Family("MS-ResNet", ms_resnet, None, (4, (2, 3, 8, 8)), (64, (4, 3, 32, 32))),
    Family("tdBN", tdbn_resnet, None, (4, (2, 2, 6, 6, 4)), (64, (4, 2, 32, 32, 4))),
    Family("Att-MS-ResNet", attention_resnet, None, (4, (4, 2, 2, 6, 6)), (64, (4, 4, 2, 32, 32))),
)
