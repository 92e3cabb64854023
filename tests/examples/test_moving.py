"""Each script of a page on moving, as it stands and as it was: the losses are the same numbers.

A line that ends in ``# was: CODE`` is what moving changed, CODE what stood there before. Where that is
nothing and the line opens a block, the block stood further to the left.
"""

import functools
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fresh
import snn_reversible_plugin as srp
from graph_only import GraphOnly, WithoutInductor
from old_spikingjelly import folder
from snn_reversible_plugin.compiler import entry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "moving"
PAGES = ROOT / "docs" / "moving"
WAS = re.compile(r"^( *)(.*?)  # was: (.*)$", re.MULTILINE)
BY_HAND = {"from_revsnn", "from_spikingjelly_12", "with_compile", "with_ddp"}  # below


def as_it_was(text):
    """The script before it was moved."""
    lines, opened, changes = [], None, 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line and opened is not None and indent <= opened:
            opened = None
        if found := WAS.match(line):
            changes += 1
            if found[3] == "nothing":
                opened = indent if found[2].endswith(":") else opened
                continue
            line = found[1] + found[3]
        lines.append(line if opened is None else line.removeprefix("    "))
    assert changes
    return "\n".join(lines)


def module(name, before=False, arithmetic="auto"):
    text = (FOLDER / f"{name}.py").read_text()
    text = as_it_was(text) if before else text
    if arithmetic != "auto":
        converted = "srp.convert_to_reversible(net"
        assert text.count(f"{converted})") == 1
        text = text.replace(f"{converted})", f'{converted}, arithmetic="{arithmetic}")')
    found = types.ModuleType(name)
    exec(compile(text, name, "exec"), found.__dict__)
    return found


def losses(name, before=False, arithmetic="auto"):
    found = module(name, before, arithmetic).train()
    assert len(set(found)) > 2, "nothing was learned"
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.py")} - BY_HAND))
def test_moving_changes_no_number(name):
    for library in ("lightning", "accelerate"):
        if name.endswith(library):
            pytest.importorskip(library)
    # A loop over time is on the grid by default: another rounding, so stock's arithmetic is asked for.
    arithmetic = "stock" if name == "from_snntorch" else "auto"
    assert losses(name, arithmetic=arithmetic) == losses(name, before=True)


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


def test_compiled_training_changes_no_number(monkeypatch):
    """The graphs that a compiler gets, run eagerly: a compilation takes half a minute, and rounds."""
    backends = []
    monkeypatch.setattr(
        entry, "Backend", lambda *given: backends.append(WithoutInductor(*given)) or backends[-1]
    )
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=GraphOnly(None)))
    torch._dynamo.reset()
    assert losses("with_compile") == losses("with_compile", before=True)
    assert any(region.packed for backend in backends for region in backend.packing.regions)


# In a process of its own, where this release is the one that is installed.
ON_OLD_RELEASE = """
import sys, warnings
import spikingjelly
from test_moving import losses
name, home = sys.argv[1:]
assert spikingjelly.__file__.startswith(home)
warnings.filterwarnings("error", message="(?s).*no spiking neuron")  # a conversion of nothing is equal, too
assert losses(name) == losses(name, before=True)
"""


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("version", "name"), [("0.0.0.0.12", "from_spikingjelly_12"), ("0.0.0.0.14", "from_spikingjelly")]
)
def test_scripts_of_older_releases_change_no_number(version, name, tmp_path):
    home = str(folder(version))
    paths = [home, str(Path(__file__).parent), *sys.path]
    ran = fresh.python(f"import sys; sys.path = {paths}\n{ON_OLD_RELEASE}", tmp_path, name, home)
    assert not ran.returncode, ran.stderr


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
