"""Published families in their own idioms and releases: converted with one call, they train as stock."""

import pytest
import torch

import snn_reversible_plugin as srp
from benchmarks.published import FAMILIES
from snn_reversible_plugin.reports import verification
from snn_reversible_plugin.reports.measure import StepCost
from snn_reversible_plugin.reports.timing import TimeRatio

pytestmark = [
    # The converter says so once of networks that have all neurons themselves.
    pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows"),
    pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES)),
]


def network(family):
    """Built anew, as snnTorch's resets know no copies."""
    torch.manual_seed(0)
    try:
        return family.network()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def tensors(found):
    return [
        t.detach().clone() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)
    ]


def train(family, model, x, autocast, steps=2):
    """All that a script may look at: outputs, losses, gradients, parameters, buffers, random numbers."""
    seen = []
    hook = model.register_forward_hook(lambda _model, _inputs, output: seen.append(tensors(output)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = family.loss(model, x)
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert sum(1 for grad in seen[-1][1:] if grad.any()) > 0.8 * (len(seen[-1]) - 1), "it trains little"
        optimizer.step()
        seen.append(tensors([*model.parameters(), *model.buffers()]))
        seen.append([torch.get_rng_state()])
    hook.remove()
    return seen


def assert_equal(expected, found):
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)
            assert not a.is_floating_point() or torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.one_in(12)
def test_trains_as_stock(family, autocast):
    if autocast and not family.amp:
        pytest.skip("its own function knows nothing of autocast")
    x = family.batch()
    if (
        family.scripted or family.version == "0.0.0.0.14"
    ):  # what TorchScript compiles, it adds up otherwise at first
        train(family, network(family), x, autocast, steps=1)
    expected = train(family, network(family), x, autocast)
    for mode in ("memory", "speed"):
        model = srp.convert_to_reversible(network(family), mode=mode, arithmetic="stock")
        assert_equal(expected, train(family, model, x, autocast))


@pytest.mark.one_in(9)
def test_trains_as_it_is_converted_by_default(family, monkeypatch):
    # What a step costs is measured in the benchmarks.
    monkeypatch.setattr(
        verification, "costs", lambda *_: (*[StepCost(0, 0, 0.0)] * 2, TimeRatio(1.0, 1.0, 1.0, 1))
    )
    model, x = srp.convert_to_reversible(network(family)), family.batch()
    checked = srp.verify(model, family.one_call(x), kwargs=family.kwargs, repeats=1)
    assert checked.ok, checked.to_dict()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(one.isfinite().all() for step in train(family, model, x, False, steps=1) for one in step)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
