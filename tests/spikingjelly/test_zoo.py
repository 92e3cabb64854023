"""The frameworks' own models, trained stock and converted from one seed: equal bit for bit."""

import pytest
import torch

from against_stock import assert_trains_like_autograd, assert_trains_like_stock, make_fire

sj_model = pytest.importorskip("spikingjelly.activation_based.model")
from spikingjelly.activation_based import functional, layer, neuron, rnn, surrogate  # noqa: E402
from spikingjelly.activation_based.model import (  # noqa: E402
    masnn,
    maxformer,
    ms_resnet,
    parametric_lif_net,
    qkformer,
    sew_resnet,
    spike_driven_transformer,
    spikformer,
    spiking_resnet,
    spiking_vgg,
)

from snn_reversible_plugin.convert import settings_of  # noqa: E402
from snn_reversible_plugin.reports.measure import count_step  # noqa: E402

LIF = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
IF = {"spiking_neuron": neuron.IFNode}
FIVE = {"num_classes": 5}
SMALL = (2, 2, 3, 32, 32)
PLIF = {"spiking_neuron": neuron.ParametricLIFNode, "surrogate_function": surrogate.Sigmoid()}


def multi_step(make):
    def build():
        model = make_fire(make())
        functional.set_step_mode(model, "m")
        return model

    return build


def narrow(vgg):
    """The classifier 32 wide in place of 4096: a hundred million weights to no other end."""
    for place, (before, after) in {0: (25088, 32), 3: (32, 32), 6: (32, 5)}.items():
        assert isinstance(vgg.classifier[place], layer.Linear)
        vgg.classifier[place] = layer.Linear(before, after)
    return vgg


ZOO = {
    "sew_resnet18 ADD LIF": (
        lambda: sew_resnet.sew_resnet18(**FIVE, cnf="ADD", **LIF),
        (4, 2, 3, 32, 32),
    ),
    "sew_resnet18 AND IF": (
        lambda: sew_resnet.sew_resnet18(**FIVE, cnf="AND", **IF),
        SMALL,
    ),
    "sew_resnet18 IAND PLIF": (
        lambda: sew_resnet.sew_resnet18(**FIVE, cnf="IAND", **PLIF),
        SMALL,
    ),
    "sew_resnet50 ADD IF": (
        lambda: sew_resnet.sew_resnet50(**FIVE, cnf="ADD", **IF),
        SMALL,
    ),
    "spiking_resnet18 LIF": (
        lambda: spiking_resnet.spiking_resnet18(**FIVE, **LIF),
        (3, 2, 3, 32, 32),
    ),
    "spiking_resnet50 IF": (
        lambda: spiking_resnet.spiking_resnet50(**FIVE, **IF),
        SMALL,
    ),
    "ms_resnet18": (lambda: ms_resnet.ms_resnet18(**FIVE), SMALL),
    "max_resnet18": (lambda: ms_resnet.max_resnet18(**FIVE), SMALL),
    "spiking_vgg11_bn PLIF": (
        lambda: narrow(spiking_vgg.spiking_vgg11_bn(**FIVE, **PLIF)),
        SMALL,
    ),
    "spiking_vgg11 LIF": (lambda: narrow(spiking_vgg.spiking_vgg11(**FIVE, **LIF)), SMALL),
    "spikformer": (
        lambda: spikformer.Spikformer(
            T=2,
            img_size_h=32,
            img_size_w=32,
            patch_size=4,
            num_classes=5,
            embed_dims=64,
            num_heads=4,
            depths=2,
        ),
        (2, 3, 32, 32),
    ),
    "maxformer": (
        lambda: maxformer.MaxFormer(T=2, **FIVE, embed_dims=96, depths=(1, 1, 1), cifar=True),
        SMALL,
    ),
    "qkformer": (
        lambda: qkformer.QKFormer(T=2, **FIVE, embed_dims=48, num_heads=(1, 2, 2), depths=(1, 1, 1)),
        (2, 2, 3, 64, 64),
    ),
    "spike-driven transformer": (
        lambda: spike_driven_transformer.SpikeDrivenTransformer(
            T=2, **FIVE, embed_dims=64, num_heads=4, depths=2
        ),
        SMALL,
    ),
    "MASNN": (lambda: masnn.MASNN(T=5, channels=(8, 8, 8), fc_hidden=16, **FIVE), (5, 2, 2, 32, 32)),
    "DVSGestureNet": (
        lambda: parametric_lif_net.DVSGestureNet(channels=8, spiking_neuron=neuron.LIFNode),
        (2, 1, 2, 128, 128),
    ),
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_spikingjelly_models(name, mode):
    make, shape = ZOO[name]
    x = torch.rand(shape) * 2
    assert_trains_like_stock(multi_step(make), (x,), steps=2 if mode == "memory" else 1, mode=mode)


ASSERT_ALIKE = {"stock": assert_trains_like_stock, "auto": assert_trains_like_autograd}


@pytest.mark.parametrize(
    "container", ["linear recurrence", "element-wise recurrence", "time last", "step by step"]
)
@pytest.mark.parametrize("arithmetic", ASSERT_ALIKE)
def test_spikingjelly_containers(container, arithmetic):
    from torch import nn

    def make():
        if container == "linear recurrence":
            node = layer.LinearRecurrentContainer(neuron.LIFNode(), 24, 24, step_mode="m")
        elif container == "element-wise recurrence":
            node = layer.ElementWiseRecurrentContainer(neuron.IFNode(), torch.add, step_mode="m")
        elif container == "time last":
            return nn.Sequential(
                layer.TLastSeqToANNContainer(nn.Linear(12, 24)),
                layer.TLastMultiStepContainer(neuron.LIFNode()),
            )
        else:
            node = layer.MultiStepContainer(nn.Linear(24, 24), neuron.ParametricLIFNode())
        return nn.Sequential(layer.Linear(12, 24, step_mode="m"), node, layer.Linear(24, 3, step_mode="m"))

    shape = (8, 12, 5) if container == "time last" else (5, 8, 12)
    ASSERT_ALIKE[arithmetic](make, (torch.rand(shape) * 3,), arithmetic=arithmetic)


@pytest.mark.parametrize("kind", [rnn.SpikingLSTM, rnn.SpikingGRU, rnn.SpikingVanillaRNN])
def test_spikingjelly_recurrent_cells(kind):
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(12, 24, 2)
            self.fc = nn.Linear(24, 3)

        def forward(self, x_seq):
            return self.fc(self.rnn(x_seq)[0])

    converted = assert_trains_like_stock(Net, (torch.rand(5, 8, 12),))
    assert settings_of(converted).stays_stock


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arithmetic", ASSERT_ALIKE)
def test_single_step_resnet_in_a_users_loop(arithmetic):
    from torch import nn

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_fire(spiking_resnet.spiking_resnet18(**FIVE, **LIF))

        def forward(self, x_seq):
            return sum(self.net(x) for x in x_seq) / len(x_seq)

    ASSERT_ALIKE[arithmetic](Loop, (torch.rand(3, 2, 3, 32, 32) * 2,), arithmetic=arithmetic)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    make, _ = ZOO["sew_resnet18 ADD LIF"]  # of one image: some CPUs have no fast products of these numbers
    assert_trains_like_stock(multi_step(make), (torch.rand(2, 1, 3, 32, 32) * 2,), autocast=dtype)


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
