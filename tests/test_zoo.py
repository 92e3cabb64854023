"""The frameworks' own models, trained stock and converted from one seed: equal bit for bit."""

import pytest
import torch
from against_stock import assert_trains_like_stock, make_fire

sj_model = pytest.importorskip("spikingjelly.activation_based.model")
from spikingjelly.activation_based import functional, neuron, surrogate  # noqa: E402
from spikingjelly.activation_based.model import (  # noqa: E402
    ms_resnet,
    parametric_lif_net,
    sew_resnet,
    spikformer,
    spiking_resnet,
    spiking_vgg,
)

from snn_reversible_plugin.memory import count_step  # noqa: E402

LIF = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
IF = {"spiking_neuron": neuron.IFNode}
PLIF = {"spiking_neuron": neuron.ParametricLIFNode, "surrogate_function": surrogate.Sigmoid()}


def multi_step(make):
    def build():
        model = make_fire(make())
        functional.set_step_mode(model, "m")
        return model

    return build


ZOO = {
    "sew_resnet18 ADD LIF": (lambda: sew_resnet.sew_resnet18(num_classes=5, cnf="ADD", **LIF), (4, 2, 3, 32, 32)),
    "sew_resnet18 AND IF": (lambda: sew_resnet.sew_resnet18(num_classes=5, cnf="AND", **IF), (2, 2, 3, 32, 32)),
    "sew_resnet18 IAND PLIF": (lambda: sew_resnet.sew_resnet18(num_classes=5, cnf="IAND", **PLIF), (2, 2, 3, 32, 32)),
    "sew_resnet50 ADD IF": (lambda: sew_resnet.sew_resnet50(num_classes=5, cnf="ADD", **IF), (2, 2, 3, 32, 32)),
    "spiking_resnet18 LIF": (lambda: spiking_resnet.spiking_resnet18(num_classes=5, **LIF), (3, 2, 3, 32, 32)),
    "spiking_resnet50 IF": (lambda: spiking_resnet.spiking_resnet50(num_classes=5, **IF), (2, 2, 3, 32, 32)),
    "ms_resnet18": (lambda: ms_resnet.ms_resnet18(num_classes=5), (2, 2, 3, 32, 32)),
    "max_resnet18": (lambda: ms_resnet.max_resnet18(num_classes=5), (2, 2, 3, 32, 32)),
    "spiking_vgg11_bn PLIF": (lambda: spiking_vgg.spiking_vgg11_bn(num_classes=5, **PLIF), (2, 2, 3, 32, 32)),
    "spiking_vgg11 LIF": (lambda: spiking_vgg.spiking_vgg11(num_classes=5, **LIF), (2, 2, 3, 32, 32)),
    "spikformer": (
        lambda: spikformer.Spikformer(
            T=2, img_size_h=32, img_size_w=32, patch_size=4, num_classes=5, embed_dims=64, num_heads=4, depths=2
        ),
        (2, 3, 32, 32),
    ),
    "DVSGestureNet": (
        lambda: parametric_lif_net.DVSGestureNet(channels=8, spiking_neuron=neuron.LIFNode),
        (2, 1, 2, 128, 128),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_spikingjelly_models(name, mode):
    make, shape = ZOO[name]
    x = torch.rand(shape) * 2
    assert_trains_like_stock(multi_step(make), (x,), steps=2 if mode == "memory" else 1, mode=mode)


def test_single_step_resnet_in_a_users_loop():
    from torch import nn

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_fire(spiking_resnet.spiking_resnet18(num_classes=5, **LIF))

        def forward(self, x_seq):
            return sum(self.net(x) for x in x_seq) / len(x_seq)

    assert_trains_like_stock(Loop, (torch.rand(3, 2, 3, 32, 32) * 2,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    make, shape = ZOO["sew_resnet18 ADD LIF"]
    assert_trains_like_stock(multi_step(make), (torch.rand(shape) * 2,), autocast=dtype)


def test_memory_goes_down():
    import snn_reversible_plugin as srp

    make, _ = ZOO["sew_resnet18 ADD LIF"]
    model = multi_step(make)()
    x = torch.rand(4, 4, 3, 64, 64)

    def loss():
        functional.reset_net(model)
        return model(x).sum()

    stock = count_step(loss)
    srp.convert_to_reversible(model)
    now = count_step(loss)
    assert now[0] < stock[0] / 6 and now[1] < stock[1] / 2
