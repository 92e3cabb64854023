"""Blocks that give a tuple, their sum first, as the Spike-driven Transformer's do."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks.beside import NotComputed
from snn_reversible_plugin.blocks.wrapped import run_plainly

C, HEADS = 8, 2


def lif():
    return neuron.LIFNode(tau=2.0, detach_reset=True, step_mode="m")


class Attention(nn.Module):
    def __init__(self, number=0):
        super().__init__()
        self.layer, self.first = number, lif()
        self.q_conv, self.v_conv, self.proj = (nn.Conv2d(C, C, 1, bias=False) for _ in range(3))
        self.q_bn, self.v_bn = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.q_lif, self.v_lif = lif(), lif()

    def forward(self, x, hook=None):
        T, B, C, H, W = x.shape
        identity, N = x, H * W
        x = self.first(x)
        if hook is not None:
            hook[self._get_name() + str(self.layer)] = x.detach()
        flat = x.flatten(0, 1)
        q = self.q_lif(self.q_bn(self.q_conv(flat)).reshape(T, B, C, H, W).contiguous())
        v = self.v_lif(self.v_bn(self.v_conv(flat)).reshape(T, B, C, H, W).contiguous())
        v = v.flatten(3).transpose(-1, -2).reshape(T, B, N, HEADS, C // HEADS).permute(0, 1, 3, 2, 4)
        v = v.contiguous()
        x = q.mul(v.transpose(3, 4).reshape(T, B, C, H, W).sum(dim=-1, keepdim=True))
        x = self.proj(x.flatten(0, 1)).reshape(T, B, C, H, W) + identity
        return x, v, hook


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif, self.conv, self.bn = lif(), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x, hook=None):
        T, B, C, H, W = x.shape
        identity = x
        x = self.bn(self.conv(self.lif(x).flatten(0, 1))).reshape(T, B, C, H, W).contiguous()
        if hook is not None:
            hook["mlp"] = x.detach()
        x = x + identity
        return x, hook


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x, hook=None):
        x_attn, attn, hook = self.attn(x, hook=hook)
        x, hook = self.mlp(x_attn, hook=hook)
        return x, attn, hook


class Plain(MLP):
    def forward(self, x):
        T, B, C, H, W = x.shape
        return x + self.bn(self.conv(self.lif(x).flatten(0, 1))).reshape(T, B, C, H, W)


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.lif = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), lif()

    def forward(self, x, hook=None):
        T, B, _, H, W = x.shape
        x = self.lif(self.bn(self.conv(x.flatten(0, 1))).reshape(T, B, -1, H, W).contiguous())
        if hook is not None:
            hook["embed"] = x.detach()
        return x, (H, W), hook


class Net(nn.Module):
    """The loop, its names and its tuples are the published ones."""

    def __init__(self, depths=3):
        super().__init__()
        self.patch_embed = Embed()
        self.block = nn.ModuleList([Block() for _ in range(depths)])
        self.head = nn.Linear(C, 5)

    def forward_features(self, x, hook=None):
        x, _, hook = self.patch_embed(x, hook=hook)
        for blk in self.block:
            x, _, hook = blk(x, hook=hook)
        return x.flatten(3).mean(3), hook

    def forward(self, x, hook=None):
        x, hook = self.forward_features(x, hook=hook)
        return self.head(x.mean(0)), hook


class UsesAttention(Net):
    def forward(self, x):
        x, _, _ = self.patch_embed(x)
        total = 0.0
        for blk in self.block:
            x, attention, _ = blk(x)
            total = total + attention.mean()
        return self.head(x.flatten(3).mean(3).mean(0)) + total, None


class HandsAttentionOn(Net):
    def forward(self, x):
        x, _, _ = self.patch_embed(x)
        attention = None
        for blk in self.block:
            x, attention, _ = blk(x, hook=attention)
        return self.head(x.flatten(3).mean(3).mean(0)), None


class TakesTheFirstRow(Net):
    """Of a tensor the first entry is no block's output."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList([Plain() for _ in range(3)])

    def forward(self, x):
        x, _, _ = self.patch_embed(x)
        for blk in self.block:
            x = blk(x)[0].unsqueeze(0)
        return self.head(x.flatten(3).mean(3).mean(0)), None


class InASequence(Net):
    """Somebody else takes the tuple of the last one."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Plain(), Block())

    def forward(self, x):
        x, _, _ = self.patch_embed(x)
        x, attention, _ = self.block(x)
        return self.head(x.flatten(3).mean(3).mean(0)) + attention.mean(), None


class GivesADictionary(Net):
    def forward(self, x):
        x, _, _ = self.patch_embed(x)
        for blk in self.block:
            x, _, _ = blk(x, hook={})
        return self.head(x.flatten(3).mean(3).mean(0)), None


def trained(net, x):
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)[0]
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]


def made(cls=Net):
    torch.manual_seed(0)
    return cls(), torch.randn(4, 2, 3, 4, 4)


def test_blocks_that_hand_tuples_through_are_a_chain():
    net, x = made()
    stock = copy.deepcopy(net)
    report = srp.wrap_residual_blocks(net)
    assert report.wrapped == ("block.0", "block.1", "block.2")
    assert len(report.chains[0]) == 3  # six branches
    assert net(x)[1] is None
    found = trained(net, x)
    with run_plainly(net):
        expected = trained(net, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert any(p.grad.any() for p in net.block.parameters())
    srp.unwrap_residual_blocks(net)
    net.load_state_dict(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trained(stock, x), trained(net, x), strict=True))


def test_converted_it_holds_less():
    net, x = made(lambda: Net(8))
    stock = copy.deepcopy(net)
    ours = srp.convert_to_reversible(net, blocks=True)

    from snn_reversible_plugin.reports.measure import count_step

    def held(one):
        functional.reset_net(one)
        return count_step(lambda: one(x)[0].mean())[0]

    assert held(ours) * 6 < held(stock)


def test_what_a_chain_does_not_compute_raises():
    net, x = made()
    srp.wrap_residual_blocks(net)
    stream = net.patch_embed(x)[0]
    out, attention, hook = net.block[0](stream)
    assert hook is None
    for use in (
        lambda: attention.mean(), lambda: attention + 1, lambda: out * attention, lambda: attention[0],
        lambda: attention == 0, lambda: torch.stack([attention, attention]), lambda: torch.sum(attention),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError), match=r"computes its sum alone|NotComputed"):
            use()
    assert isinstance(copy.deepcopy(attention), NotComputed)


def test_a_dictionary_is_refused():
    net, x = made()
    srp.wrap_residual_blocks(net)
    with pytest.raises(RuntimeError, match="was given more than its input"):
        net(x, hook={})


@pytest.mark.parametrize(
    "cls", [UsesAttention, HandsAttentionOn, GivesADictionary, TakesTheFirstRow, InASequence]
)
def test_where_more_than_the_sum_is_used_it_stays_stock(cls):
    net, x = made(cls)
    report = srp.wrap_residual_blocks(net, dry_run=True)
    assert report.wrapped == ()
    if cls is not HandsAttentionOn:
        stock = copy.deepcopy(net)
        ours = srp.convert_to_reversible(net, blocks=True, arithmetic="stock")
        assert torch.equal(trained(stock, x)[0], trained(ours, x)[0])
