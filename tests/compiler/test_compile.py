"""``srp.compile`` in a user's hands. Two networks are really compiled."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.compiler import backend, entry, loops


class Scaled(nn.Module):
    """A layer of spikes, and a scale whose gradient tells which elements a dropout let through."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(layer.Linear(16, 16), neuron.LIFNode(step_mode="m"), layer.Linear(16, 16))
        self.scale = nn.Parameter(torch.ones(4, 8, 16))

    def forward(self, x_seq):
        return nn.functional.dropout(self.net(x_seq) * self.scale, 0.5)


def test_compiled_by_inductor():
    """Two compilations, ours and stock's: outputs and gradients, random numbers, states, what is stored."""
    net = Scaled()
    compiled = srp.compile(net)
    assert list(compiled._orig_mod.state_dict()) == list(net.state_dict())
    x = torch.rand(4, 8, 16) * 3
    # A budget of the user's makes stock's compiler draw a dropout's mask a second time.
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(activation_memory_budget=0.1),
    ):
        out = compiled(x)
    out.sum().backward()
    kept = out != 0
    assert 0 < kept.float().mean() < 1
    # What came out is scale * current / (1 - p), and the scale is one: so its gradient is what came out.
    assert torch.equal(net.scale.grad, out.detach())
    (region,) = compiled.forward.backend.packing.regions
    assert region.packed >= 2 and region.stored["codes"] < 4 * 8 * 16
    assert net.net[1].v.shape == (8, 16)
    functional.reset_net(net)
    verification = srp.verify(compiled, x, repeats=1)
    assert verification.ok and verification.outputs_equal
    assert verification.compiled.held < verification.stock.held
    assert verification.on_tape is None and verification.stored == region.stored
    verification.print()


class Stepped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 4), neuron.LIFNode()
        self.calls = 0

    def forward(self, x_seq):
        return torch.stack([self.lif(self.fc(x)) for x in x_seq])


def test_a_long_loop_runs_on_the_tape():
    net = Stepped()
    compiled = srp.compile(net)
    x = torch.rand(loops.MOST_UNROLLED + 1, 2, 4)
    with pytest.warns(UserWarning, match=r"Stepped is not compiled: one call steps '(fc|lif)' more than"):
        out = compiled(x)
    out.sum().backward()
    assert net.fc.weight.grad is not None
    assert isinstance(net, type(srp.convert_to_reversible(net))) and compiled.forward.on_tape is not None


def test_looking_at_loops_changes_nothing():
    net = Stepped()
    net(torch.rand(2, 2, 4))
    v, random = net.lif.v.clone(), torch.get_rng_state()
    assert loops.is_too_long(net, (torch.rand(loops.MOST_UNROLLED, 2, 4),), {}) is None
    assert f"Beyond {loops.MOST_UNROLLED} time" in (srp.compile.__doc__ or "")
    assert loops.is_too_long(net, (torch.rand(1000, 2, 4),), {}) in ("fc", "lif")
    assert torch.equal(net.lif.v, v) and not net.fc._forward_pre_hooks and not net.lif._forward_pre_hooks
    torch.set_rng_state(random)


def test_where_torch_lacks_a_hook_the_tape_serves(monkeypatch):
    monkeypatch.setattr(entry, "missing", lambda: "joint_custom_post_pass")
    compiled = srp.compile(Stepped(), mode="speed")
    with pytest.warns(UserWarning, match="lacks joint_custom_post_pass"):
        compiled(torch.rand(2, 2, 4)).sum().backward()


def test_regions_that_talk_to_other_processes():
    def graph_of(operation):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(operation, (graph.placeholder("x"),)))
        return torch.fx.GraphModule({}, graph)

    functional_ops = pytest.importorskip("torch.distributed._functional_collectives")
    assert backend.exchanges(graph_of(functional_ops.all_reduce))
    assert backend.exchanges(graph_of(torch.ops._c10d_functional.all_reduce.default))
    assert not any(map(backend.exchanges, (graph_of(torch.relu), graph_of(torch.ops.aten.relu.default))))


def test_refusals():
    with pytest.raises(ValueError, match="torch_mode"):
        srp.compile(Stepped(), mode="reduce-overhead")
    with pytest.raises(TypeError, match="backend"):
        srp.compile(Stepped(), backend="inductor")
    with pytest.raises(TypeError, match="compiled"):
        srp.compile(srp.compile(Stepped()))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        srp.compile(torch.relu)


@pytest.mark.slow
def test_where_lightning_is_imported():
    """It copies what ``torch.compile`` is given."""
    code = (
        "import lightning.fabric, torch, snn_reversible_plugin as srp\n"
        "print(*srp.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)))._compile_kwargs)"
    )
    pytest.importorskip("lightning")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["backend"], found.stderr


def test_entry_point_and_modes():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["srp"].partition(":")
    assert getattr(importlib.import_module(module), name) is backend.srp
    assert backend.missing() is None
    assert backend.patches_of("max-autotune-no-cudagraphs", {"fallback_random": True}) == {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "fallback_random": True,
    }
    memory, speed = (backend.Backend(mode).packing.uuid() for mode in ("memory", "speed"))
    assert memory == backend.Backend("memory").packing.uuid() != speed
