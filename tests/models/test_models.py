"""The published models: their parameter counts, and training as their blocks run plainly."""

import copy
from contextlib import nullcontext

import pytest
import snntorch
import torch

import snn_reversible_plugin as srp
from snn_reversible_plugin import models
from snn_reversible_plugin.blocks import RevSSequence
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.reports.measure import count_step


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: models.rev_s_resnet21(num_classes=100), 11_048_420),
        (lambda: models.rev_s_resnet37(num_classes=100), 23_590_884),
        (lambda: models.rev_s_resnet24(num_classes=10), 260_362),
        (lambda: models.rev_s_resnet24(neuron="leaky"), 260_362),
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
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def synaptic():
    return snntorch.Synaptic(alpha=0.7, beta=0.6, learn_beta=True, init_hidden=True)


@pytest.mark.one_in(12)
@pytest.mark.parametrize("neuron", ["if", "lif", "plif", "leaky", "Lapicque", synaptic])
@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("arithmetic", [None, "stock", "auto"])
def test_training_equals_the_plain_run(name, neuron, arithmetic):
    make, shape = SMALL[name]
    model = make(num_classes=5, neuron=neuron)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, RevSSequence):
            module.reversible = False
    for module in model.modules():
        if isinstance(module, RevSSequence):
            module.check = True
    if arithmetic is not None:
        srp.convert_to_reversible(model, arithmetic=arithmetic)
    if arithmetic == "auto":
        srp.convert_to_reversible(plain)
    x = torch.randn(shape)
    for _ in range(2):
        ours = step(model, x)
        with differentiated(plain) if arithmetic == "auto" else nullcontext():
            theirs = step(plain, x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours[0].shape == (2, 5)
    chains = [module for module in model.modules() if isinstance(module, RevSSequence)]
    assert all(chain.last_rebuild.flipped_bits == 0 for chain in chains)


def test_depth_109_is_depth_37_with_the_blocks_that_its_authors_add():
    """Their code has blocks 2, 4, 16, 4 for 109 and 1, 2, 3, 2 for 37, whose number the paper gives."""
    with torch.device("meta"):
        model = models.rev_s_resnet109(num_classes=100)
    assert sum(len(m.blocks) for m in model.modules() if isinstance(m, RevSSequence)) == 26
    block = [4 * (9 * width * width + 2 * width) for width in (64, 128, 256, 448)]  # four convs and norms
    more = 1 * block[0] + 2 * block[1] + 13 * block[2] + 2 * block[3]
    assert sum(p.numel() for p in model.parameters()) == 23_590_884 + more == 70_075_876


@pytest.mark.parametrize("neuron", ["lif", "leaky"])
def test_a_call_is_a_whole_simulation(neuron):
    model = models.rev_s_resnet24(neuron=neuron).eval()
    x = torch.rand(3, 2, 2, 9, 9) * 2
    first = model(x)
    model(torch.rand(2, 1, 2, 9, 9) * 5)  # another batch size, and a state left behind if there were one
    assert torch.equal(model(x), first)
    held = [
        t
        for m in model.modules()
        for t in [*m._buffers.values(), *m.__dict__.get("_memories", {}).values()]
    ]
    assert not any(t.grad_fn is not None for t in held if isinstance(t, torch.Tensor))


@pytest.mark.slow
def test_resnet37_peaks_below_ten_megabytes_an_image():
    model, batch = srp.convert_to_reversible(models.rev_s_resnet37(num_classes=100), mode="memory"), 4
    for chain in [m for m in model.modules() if isinstance(m, RevSSequence)]:
        chain.mode = "memory"
    x = torch.rand(batch, 3, 32, 32)
    _, peak = count_step(lambda: model(x).square().sum())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    assert peak - gradients <= 9.6e6 * batch  # workspaces of the convolutions included


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
    with pytest.raises(ValueError, match="init_hidden=True"):
        models.rev_s_resnet24(neuron=lambda: snntorch.Leaky(beta=0.5))
    with pytest.raises(ValueError, match="patch must be"):
        models.rev_s_former(1, 24, patch=3)
    with pytest.raises(ValueError, match="multiple of 8"):
        models.rev_s_former(1, 20)
