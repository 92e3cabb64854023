"""T-RevSNN: the published sizes, and training that is the plain run's, bit for bit."""

import copy

import pytest
import torch

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.models import TRevSNN, t_rev_snn
from snn_reversible_plugin.models.t_rev_snn import Fire, StandardizedConv2d
from snn_reversible_plugin.reports.measure import count_step
from tests.blocks.test_chain import assert_same


@pytest.mark.parametrize(
    ("size", "parameters"), [("tiny", 17_376_912), ("small", 32_331_312), ("tiny_dvs", 10_412_364)]
)
def test_published_parameter_counts(size, parameters):
    with torch.device("meta"):
        model = t_rev_snn(size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def tiny(events, steps=4, **kwargs):
    torch.manual_seed(0)
    return TRevSNN((4, 6, 8, 5), steps=steps, num_classes=3, events=events, auxiliary=not events, **kwargs)


def inputs(events, steps=4, pixels=32):
    torch.manual_seed(1)
    if events:
        return (torch.rand(steps, 2, 2, pixels // 2, pixels // 2) > 0.7).float()
    return torch.randn(2, 3, pixels, pixels) * 2


def step(model, x):
    model.zero_grad()
    torch.manual_seed(2)
    out = model(x)
    outs = out if isinstance(out, tuple) else (out,)
    sum((o * torch.randn(o.shape)).sum() for o in outs).backward()
    return [*outs, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.one_in(2)
def test_it_trains_as_its_plain_run(events, mode):
    model = tiny(events, mode=mode)
    model.columns.check = True
    plain = copy.deepcopy(model)
    plain.columns.reversible = False
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(3):
        assert_same(*(step(m, inputs(events)) for m in (model, plain)))
        assert model.columns.last_rebuild.flipped_bits == 0
        for optimizer in optimizers:
            optimizer.step()
    assert_same([model.eval()(inputs(events))], [plain.eval()(inputs(events))])


def test_under_conversion_autocast_and_double_the_steps():
    model = tiny(False, steps=8)
    plain = copy.deepcopy(model)
    plain.columns.reversible = False
    srp.convert_to_reversible(model)
    results = []
    for m in (model, plain):
        # With a cache, autograd adds up the terms of a shared parameter in bfloat16, in the plain run.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            results.append(step(m, inputs(False)))
    assert len(results[0]) > 100
    assert_same(*results)


@pytest.mark.parametrize(("pixels", "treatment"), [(4, "kept"), (2, "replayed")])
def test_a_standardized_weight_is_made_again_where_it_is_larger_than_the_input(pixels, treatment):
    conv, seen = StandardizedConv2d(4, 8, 1), []

    def forward(_x, weight, _bias):
        seen.append(tape.handle_of(weight).treatment)
        return _x

    conv._conv_forward = forward
    with tape.recording("memory"):
        conv(torch.rand(2, 4, pixels, 1))
    assert seen == [treatment]


def test_every_parameter_learns():
    model = tiny(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(
                module.weight
            )  # so that every neuron fires, which takes training otherwise
    step(model, inputs(False))
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The factors of the first time step meet a state of zeros.
    assert idle == [f"columns.alphas.0.{k}" for k in range(4)]


@pytest.mark.slow
def test_held_memory_is_flat_in_the_number_of_sub_networks():
    def held(steps):
        model, x = tiny(False, steps=steps, alpha=1.0), inputs(False, pixels=64)
        return count_step(lambda: sum(out.sum() for out in model(x)))[0]

    assert held(32) <= 1.02 * held(4)


def test_spikes_and_standardized_filters():
    x = torch.tensor([-0.1, 0.0, 0.2, 0.5, 1.0, 1.1], requires_grad=True)
    spikes = Fire()(x)
    spikes.sum().backward()
    assert spikes.tolist() == [0, 0, 0, 1, 1, 1]
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    torch.manual_seed(0)
    conv = StandardizedConv2d(6, 5, 3)
    seen = conv(torch.eye(54).view(54, 6, 3, 3)) - conv(torch.zeros(1, 6, 3, 3))
    torch.testing.assert_close(seen.mean(0).flatten(), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        seen.var(0, unbiased=False).flatten(), torch.full((5,), 1 / 54), rtol=1e-3, atol=0
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one of"):
        t_rev_snn("huge")
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        TRevSNN((4, 4, 4, 4), steps=6)
    with pytest.raises(ValueError, match="four levels"):
        TRevSNN((4, 4, 4))
    with pytest.raises(ValueError, match=r"\[4, N, 2, H, W\], not \(3, 2, 2, 8, 8\)"):
        tiny(True)(torch.zeros(3, 2, 2, 8, 8))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        tiny(False)(torch.zeros(3, 8, 8))
