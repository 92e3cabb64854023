"""The published models: their parameter counts, and training as their blocks run plainly."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional

import snn_reversible_plugin as srp
from snn_reversible_plugin import models
from snn_reversible_plugin.blocks import RevSSequence


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: models.rev_s_resnet21(num_classes=100), 11_048_420),
        (lambda: models.rev_s_resnet37(num_classes=100), 23_590_884),
        (lambda: models.rev_s_resnet24(num_classes=10), 260_362),
        (lambda: models.rev_s_former(2, 384, num_classes=10), 5_766_586),
        (lambda: models.rev_s_former(4, 384, num_classes=10), 9_323_962),
    ],
)
def test_parameter_counts_are_the_papers(make, count):
    assert sum(p.numel() for p in make().parameters()) == count


SMALL = {
    "resnet": (lambda **kw: models.RevSResNet((1, 2), (4, 6), T=3, **kw), (2, 3, 9, 8)),
    "events": (lambda **kw: models.RevSResNet((1, 1), (2, 3), in_channels=2, **kw), (4, 2, 2, 8, 8)),
    "former": (lambda **kw: models.rev_s_former(2, 24, T=2, **kw), (2, 3, 8, 8)),
    "former of events": (
        lambda **kw: models.rev_s_former(1, 32, T=None, in_channels=2, patch=16, **kw),
        (2, 2, 2, 32, 32),
    ),
}


def step(model, x):
    functional.reset_net(model)
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("neuron", ["if", "lif", "plif"])
@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("converted", [False, True])
def test_training_equals_the_plain_run(name, neuron, converted):
    make, shape = SMALL[name]
    model = make(num_classes=5, neuron=neuron)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, RevSSequence):
            module.reversible = False
    for module in model.modules():
        if isinstance(module, RevSSequence):
            module.check = True
    if converted:
        srp.convert_to_reversible(model)
    x = torch.randn(shape)
    for _ in range(2):
        ours, theirs = step(model, x), step(plain, x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours[0].shape == (2, 5)
    chains = [module for module in model.modules() if isinstance(module, RevSSequence)]
    assert all(chain.last_rebuild.flipped_bits == 0 for chain in chains)


def test_depth_109_has_26_blocks():
    with torch.device("meta"):
        model = models.rev_s_resnet109()
    assert sum(len(m.blocks) for m in model.modules() if isinstance(m, RevSSequence)) == 26


@pytest.mark.parametrize(
    ("make", "shape", "text"),
    [
        (models.rev_s_resnet24, (2, 2, 8, 8), "time steps"),
        (models.rev_s_resnet24, (2, 2, 3, 8, 8), r"\[T, N, 2, H, W\]"),
    ],
)
def test_wrong_inputs_are_refused(make, shape, text):
    with pytest.raises(ValueError, match=text):
        make()(torch.randn(shape))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="depths for"):
        models.RevSResNet((1,), (2, 3))
    with pytest.raises(ValueError, match="neuron must be"):
        models.rev_s_resnet24(neuron="izhikevich")
    with pytest.raises(ValueError, match="patch must be"):
        models.rev_s_former(1, 24, patch=3)
    with pytest.raises(ValueError, match="multiple of 8"):
        models.rev_s_former(1, 20)
