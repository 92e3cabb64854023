"""Each script of a page on moving, as it stands and as it was: the losses are the same numbers.

A line that ends in ``# was: CODE`` is what moving changed, CODE what stood there before.
"""

import re
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import snn_reversible_plugin as srp

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "moving"
PAGES = ROOT / "docs" / "moving"
WAS = re.compile(r"^( *)(.*?)  # was: (.*)$", re.MULTILINE)
BY_HAND = {"from_revsnn", "with_ddp"}  # below


def module(name, before=False):
    text = (FOLDER / f"{name}.py").read_text()
    if before:
        text, changed = WAS.subn(lambda m: m[1] + ("pass" if m[3] == "nothing" else m[3]), text)
        assert changed
    found = types.ModuleType(name)
    exec(compile(text, name, "exec"), found.__dict__)
    return found


def losses(name, before=False, **arguments):
    found = module(name, before).train(**arguments)
    assert len(set(found)) > 2, "nothing was learned"
    return found


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.py")} - BY_HAND))
def test_moving_changes_no_number(name):
    for library in ("lightning", "accelerate"):
        if name.endswith(library):
            pytest.importorskip(library)
    # A loop over time is on the grid by default: another rounding, so stock's arithmetic is asked for.
    exact = {"arithmetic": "stock"} if name == "from_snntorch" else {}
    assert losses(name, **exact) == losses(name, before=True)


def test_a_loop_on_the_grid_trains_alike():
    assert losses("from_snntorch") == pytest.approx(losses("from_snntorch", before=True), rel=1e-2)


@pytest.mark.parametrize("network", ["RevNet", "RevColumns"])
def test_published_networks_train_as_under_autograd(network):
    script = module("from_revsnn")
    network = getattr(script, network)
    found = script.train(network)
    assert found == script.train(network, reversible=False) and len(set(found)) == 4


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_training_changes_no_number(alone):
    assert losses("with_ddp") == losses("with_ddp", before=True)


def test_parameters_that_are_let_go_of_after_their_layer_are_refused_with_the_remedy(alone):
    script = (FOLDER / "with_ddp.py").read_text().replace(", reshard_after_forward=False", "")
    found = types.ModuleType("with_ddp")
    exec(script, found.__dict__)
    with pytest.raises(RuntimeError, match=r"fully_shard\(layer, reshard_after_forward=False\)"):
        found.train()


def test_own_neurons_spikes_are_found_to_be_bits():
    with pytest.warns(UserWarning, match="no spiking neuron"):
        net = srp.convert_to_reversible(module("own_neurons").make())
    report = srp.memory_report(net, torch.rand(10, 8, 20))
    assert report.converted.held < report.stock.held / 3 and report.bits


def test_pages_show_the_scripts_and_diffs_that_are_true():
    pages = "".join(page.read_text() for page in PAGES.glob("*.md"))
    for path in FOLDER.glob("*.py"):
        assert f'--8<-- "examples/moving/{path.name}"' in pages, f"{path.name} is on no page"
    scripts = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    known = {line.strip() for line in WAS.sub(r"\2\n\3", scripts).splitlines()}
    for diff in re.findall(r"```diff\n(.*?)```", pages, re.DOTALL):
        for line in diff.splitlines():
            if line[:1] in "+-":
                assert line[1:].strip() in known, line
