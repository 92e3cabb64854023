"""FSDP2 (``fully_shard``) with two gloo processes: chains train as the same blocks run plainly."""

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks import RevSSequence
from snn_reversible_plugin.blocks.wrapped import wrapped_chains
from snn_reversible_plugin.models import rev_s_resnet24
from tests.blocks.test_chain import branch
from tests.blocks.test_leapfrog import network
from tests.blocks.test_pipeline import Top
from two_processes import together

WAYS, MORE_WAYS = ["model", "neurons' neighbours", "half precision"], ["chain", "blocks", "branches"]


def small():
    """Two chains, one of them deep."""
    torch.manual_seed(0)
    chains = [
        RevSSequence([srp.RevSBlock(branch(4), branch(4)) for _ in range(depth)], states="reset")
        for depth in (3, 1)
    ]
    return nn.Sequential(nn.Linear(3, 3), *chains, nn.Linear(3, 3))


def events():
    torch.manual_seed(0)
    return rev_s_resnet24(neuron="lif")


MODELS = {"small": (small, (3, 2, 8, 3, 3)), "resnet24": (events, (2, 2, 2, 12, 12))}


def shard(model, way):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for chain in [module for module in model.modules() if isinstance(module, RevSSequence)]:
        for block in chain.blocks:
            if way == "blocks":
                fully_shard(block)
            if way == "branches":
                fully_shard(block.f)
                fully_shard(block.g)
            if way == "half precision":
                for layer in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
                    fully_shard(layer, mp_policy=policy)
            if way == "neurons' neighbours":
                fully_shard(block.f[1])
                fully_shard(block.g)
        if way == "chain":
            fully_shard(chain)
    fully_shard(model)


def train(rank, ways, name):
    """Two steps of each way and of the plain run of it; the second of two batches adds its gradient."""
    make, shape = MODELS[name]
    results = {}
    for way in ways:
        parameters = []
        for reversible in (True, False):
            model = make()
            for chain in [module for module in model.modules() if isinstance(module, RevSSequence)]:
                chain.reversible = chain.check = reversible
            shard(model, way)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            torch.manual_seed(10 + rank)
            for _ in range(2):
                optimizer.zero_grad()
                for _ in range(2):
                    model(torch.rand(shape) * 3).square().mean().backward()
                optimizer.step()
            parameters.append([p.full_tensor() for p in model.parameters()])
            sharded = all(type(p.data).__name__ == "DTensor" for p in model.parameters())
        same = all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
        moved = [not torch.equal(p, q) for p, q in zip(parameters[0], make().parameters(), strict=True)]
        flips = [c.last_rebuild.flipped_spikes for c in model.modules() if getattr(c, "last_rebuild", None)]
        results[way] = (same, sharded, sum(moved) > 0.8 * len(moved), not any(flips))
    return results


def shards_on_the_cpu():
    """Whether this torch's FSDP2 gathers without a GPU; older ones ask a CPU stream for its events."""
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.cpu.Stream, "record_event")


@pytest.mark.skipif(not shards_on_the_cpu(), reason="this torch has no FSDP2 for the CPU")
@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "ways"), [("small", WAYS), ("small", MORE_WAYS), ("resnet24", ["branches"])]
)
def test_two_processes_train_as_the_plain_blocks_do(tmp_path, name, ways):
    assert together(tmp_path, train, ways, name) == 2 * [dict.fromkeys(ways, (True, True, True, True))]


WRAPPED_WAYS = ["model", "container", "layers"]


def wrapped(reversible):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 5), network(4), nn.Linear(5, 5))
    srp.wrap_residual_blocks(model, states="reset")
    (chain,) = wrapped_chains(model)
    chain.chain.reversible = chain.chain.check = reversible
    return model, chain.chain


def train_wrapped(rank):
    from torch.distributed.fsdp import fully_shard

    results = {}
    for way in WRAPPED_WAYS:
        parameters = []
        for reversible in (True, False):
            model, chain = wrapped(reversible)
            if way == "container":
                fully_shard(model[1])
            for layer in (
                [m for m in model[1].modules() if isinstance(m, nn.Conv2d)] if way == "layers" else []
            ):
                fully_shard(layer)
            fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            torch.manual_seed(10 + rank)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.rand(3, 2, 4, 5, 5) * 3).square().mean().backward()
                optimizer.step()
            parameters.append([p.full_tensor() for p in model.parameters()])
            if reversible:
                flips = chain.last_rebuild.flipped_spikes
        moved = [
            not torch.equal(p, q) for p, q in zip(parameters[0], wrapped(True)[0].parameters(), strict=True)
        ]
        same = all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
        results[way] = (same, sum(moved) > 0.8 * len(moved), flips)
    model, _ = wrapped(True)
    fully_shard(model[1][1])
    with pytest.raises(RuntimeError, match=r"fully_shard was called on block 1.*Shard the model"):
        model(torch.rand(3, 2, 4, 5, 5))
    return results


@pytest.mark.skipif(not shards_on_the_cpu(), reason="this torch has no FSDP2 for the CPU")
def test_wrapped_blocks_train_as_their_plain_run(tmp_path):
    assert together(tmp_path, train_wrapped) == 2 * [dict.fromkeys(WRAPPED_WAYS, (True, True, 0))]


COLUMNS_WAYS = ["model", "columns", "levels", "half precision"]


def train_columns(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    results = {}
    for way in COLUMNS_WAYS:
        parameters = []
        for reversible in (True, False):
            torch.manual_seed(1)
            model = Top()
            model.columns.reversible = model.columns.check = reversible
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            for levels in model.columns.subnets:
                for level in levels:
                    if way == "levels":
                        fully_shard(level)
                    for conv in [m for m in level.modules() if isinstance(m, nn.Conv2d)]:
                        if way == "half precision":
                            fully_shard(conv, mp_policy=policy)
            if way == "columns":
                fully_shard(model.columns)
            fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            torch.manual_seed(10 + rank)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.rand(2, 2, 4, 5, 5)).square().mean().backward()
                optimizer.step()
            parameters.append([p.full_tensor() for p in model.parameters()])
            if reversible:
                flips = model.columns.last_rebuild.flipped_bits
        torch.manual_seed(1)
        moved = [not torch.equal(p, q) for p, q in zip(parameters[0], Top().parameters(), strict=True)]
        same = all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
        results[way] = (same, sum(moved) > 0.7 * len(moved), flips)
    return results


@pytest.mark.skipif(not shards_on_the_cpu(), reason="this torch has no FSDP2 for the CPU")
def test_columns_train_as_their_plain_run(tmp_path):
    assert together(tmp_path, train_columns) == 2 * [dict.fromkeys(COLUMNS_WAYS, (True, True, 0))]
