"""The benchmarks measure what they say: peers compute stock's gradients, and the search finds the edge."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch import utils as snn_utils
from spikingjelly.activation_based import functional
from torch import nn

from benchmarks.measure import measure, peak_within
from benchmarks.methods import METHODS, prepare
from benchmarks.networks import LIFLoop, reversible_chain, yardstick_vgg
from benchmarks.peers.checkpointed import checkpoint_blocks
from benchmarks.search import largest_within
from benchmarks.tables import markdown
from benchmarks.tables import steps as tables
from benchmarks.workloads import WORKLOADS, Workload, logits_loss, rate_loss

CHAIN = reversible_chain(2, width=4)


def tiny(make=CHAIN, shape=(2, 1, 2, 6, 6), **more):
    return Workload("chain", make, shape, shape, rate_loss, **more)


def by_method(workload, methods, repeats=1):
    found = measure(workload, workload.full, "cpu", methods, repeats, lambda _: None)
    return {result.method: result for result in found}


@pytest.mark.slow
def test_earlier_networks_of_snntorch_are_not_counted():
    workload = WORKLOADS["tutorial-6"]
    x, peaks = workload.batch((2, 1, 28, 28), "cpu"), []
    for _ in range(3):
        model = workload.make()

        def run(x, model=model):
            workload.loss_of(model, x).backward()

        run(x)
        peaks.append(peak_within(SimpleNamespace(model=model, run=run), x, 1 << 40))
    assert peaks[0] == peaks[1] == peaks[2]


def test_a_peak_over_the_limit_is_no_peak():
    training = SimpleNamespace(model=torch.nn.Linear(2, 2), run=lambda x: torch.cat((x, x)))
    x = torch.zeros(1024)
    assert peak_within(training, x, 8192) == 8192
    assert peak_within(training, x, 8191) is None


@given(
    slope=st.integers(1, 50), offset=st.integers(0, 500), bend=st.integers(0, 3),
    budget=st.integers(0, 5000), start=st.integers(1, 64),
)  # fmt: skip
def test_the_search_finds_the_last_size_that_fits(slope, offset, bend, budget, start):
    def peak(size):
        bytes_ = offset + slope * size + bend * size * size // 10
        return bytes_ if bytes_ <= budget else None

    expected = max((n for n in range(1, 301) if peak(n) is not None), default=0)
    assert largest_within(peak, budget, start, 300) == expected


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["checkpoint", "memopt 1", "speed", "memory", "blocks", "blocks + tape"])
def test_gradients_on_a_reversible_chain_are_stocks(name):
    found = by_method(tiny(), ["stock", name])
    assert found[name].why_not is None
    assert found[name].gradient_difference == 0 and found["stock"].gradient_scale > 0
    assert found[name].flipped_spikes == 0 and found[name].spikes == found["stock"].spikes > 0
    # What peers put by for a second run (random number states) is more than this tiny chain holds.
    assert name in ("checkpoint", "memopt 1") or found[name].held < found["stock"].held
    assert len(found[name].seconds) == 1 and found[name].time_ratio > 0


def test_the_published_procedure_is_near_autograd_on_its_own_forward():
    found = by_method(tiny(), ["stock", "published"])["published"]
    assert 0 < found.gradient_error < 1e-4 * found.gradient_scale
    assert 0 < found.rebuild_error < 1e-5 and found.rebuilt_flips == 0


def test_the_published_procedure_counts_a_batch_twice_and_ours_once():
    workload = tiny()
    torch.manual_seed(0)
    stock, x = workload.make(), torch.rand(workload.full)
    counted = {}
    for name in ("stock", "published", "blocks"):
        training = prepare(name, workload, stock, x)
        training.run(x)
        counted[name] = {
            int(b) for key, b in training.model.named_buffers() if key.endswith("batches_tracked")
        }
    assert counted == {"stock": {1}, "published": {2}, "blocks": {1}}


def test_checkpoints_by_hand_step_states_and_statistics_once():
    torch.manual_seed(0)
    stock, x = yardstick_vgg(), torch.rand(3, 2, 2, 32, 32)
    model = yardstick_vgg()
    model.load_state_dict(stock.state_dict())
    checkpoint_blocks(model, (type(model[0]),))
    for net in (stock, model):
        for _ in range(2):  # states carried over from the first call
            net.zero_grad()
            net(x).sum().backward()
            for module in net.modules():
                if hasattr(module, "_memories"):
                    module._memories.update({k: v.detach() for k, v in module._memories.items()})
    assert all(torch.equal(a, b) for a, b in zip(stock.buffers(), model.buffers(), strict=True))
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(stock.parameters(), model.parameters(), strict=True)
    )
    states = [[m.v for m in net.modules() if hasattr(m, "v")] for net in (stock, model)]
    assert len(states[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    functional.reset_net(model)


@pytest.mark.parametrize("name", ["leaky-loop", "lif-loop", "tutorial-6"])
def test_loops_checkpointed_by_hand_compute_stocks_loss(name):
    workload = WORKLOADS[name]
    shape = (4, 2, 512) if name != "tutorial-6" else (2, 1, 28, 28)
    torch.manual_seed(0)
    model, x = workload.make(), torch.rand(shape)
    losses, gradients = [], []
    for loss_of in (workload.loss_of, workload.checkpointed):
        model.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert any(g.abs().max() > 0 for g in gradients[0])
    # Equal up to the order in which the steps' terms are summed.
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    snn_utils.reset(model)


def test_a_method_that_cannot_run_says_why():
    loop = Workload("loop", lambda: LIFLoop(8), (3, 2, 8), None, logits_loss, checkpointed=logits_loss)
    found = by_method(loop, ["stock", "memopt 1", "published", "blocks"])
    assert "user's own" in found["memopt 1"].why_not
    assert "reversible blocks" in found["published"].why_not
    assert found["blocks"].why_not is not None and found["blocks"].peak is None
    assert "levels 2 to 4" in by_method(tiny(), ["stock", "memopt 3"])["memopt 3"].why_not


def test_a_peer_that_fails_is_a_result_and_stock_is_not():
    class Failing(nn.Linear):
        def forward(self, x):
            if failing:
                raise NotImplementedError("no kernel\nand more")
            return super().forward(x)

    def refuses(workload, make, x):
        training = prepare("stock", workload, make(), x)
        training.loss_of = lambda _: torch.zeros(())  # without a graph
        return training

    failing = True
    broken = Workload("broken", lambda: Failing(2, 2), (2, 2), None, lambda model, x: model(x).sum())
    with pytest.raises(NotImplementedError):
        by_method(broken, ["stock"])
    failing = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "checkpoint", replace(METHODS["checkpoint"], prepare=refuses))
        found = by_method(broken, ["stock", "checkpoint"])
    assert found["checkpoint"].why_not.startswith("RuntimeError: element 0 of tensors")
    assert found["checkpoint"].peak is None and found["stock"].peak is not None


def test_tables_say_who_is_behind():
    def entry(method, peak, time):
        return {"workload": "net", "method": method, "peak": peak * 2**20, "held": 0, "time_ratio": time}

    entries = {
        m: entry(m, p, t) for m, p, t in (("stock", 9, 1.0), ("checkpoint", 4, 1.4), ("memory", 3, 1.2))
    }
    text = markdown(tables.behind(entries))
    assert "| stock | 1 |  | 1: the fastest of those takes 1.20x of its time |" in text
    assert "Nowhere ahead: checkpoint (on 1)." in text
    entries["checkpoint"] = entry("checkpoint", 2, 1.4)
    assert "| checkpoint | 1 | 1: net |  |" in markdown(tables.behind(entries))
    entries["stock"] = entry("stock", 9, 1.3)
    assert "Nowhere ahead: stock (on 1)." in markdown(tables.behind(entries))
    entries["checkpoint"] = entry("checkpoint", 3, 1.2)
    assert markdown(tables.behind(entries)) == "Nowhere: stock on 1, checkpoint on 1."


def test_every_method_is_drawn_and_explained():
    assert len({(method.color, method.marker) for method in METHODS.values()}) == len(METHODS)
    assert [name for name, method in METHODS.items() if not method.about] == [
        "memopt 2",
        "memopt 3",
        "memopt 4",
    ]


def test_over_budget_is_none_and_leaves_the_model_usable():
    workload = tiny()
    stock, x = workload.make(), torch.rand(workload.full)
    training = prepare("memory", workload, stock, x)
    peak = peak_within(training, x, float("inf"))
    assert peak_within(training, x, peak) == peak
    assert peak_within(training, x, peak - 1) is None
    assert peak_within(training, x, float("inf")) == peak
