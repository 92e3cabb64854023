"""Importing the package needs torch only, and a missing extra is named."""

import pytest

import fresh


@pytest.fixture
def python(tmp_path):
    """Runs code where some modules can't be imported."""

    def run(code, *blocked):
        block = "import sys; " + "; ".join(f"sys.modules[{name!r}] = None" for name in blocked) + ";"
        return fresh.python(block + code, tmp_path)

    return run


def test_torch_is_enough(python):
    others = ("spikingjelly", "snntorch", "tonic", "sklearn", "matplotlib", "rich", "typer", "tqdm")
    code = """
import torch, snn_reversible_plugin as srp
spikes = torch.nn.Sequential(torch.nn.Linear(8, 8))
with srp.reversible(spikes):
    loss = (spikes(torch.ones(4, 8)) > 0).float().mul(torch.ones(8, requires_grad=True)).sum()
loss.backward()
"""
    result = python(code, *others)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
@pytest.mark.one_in(2)
def test_a_missing_framework_names_its_extra(python, framework):
    result = python(f"import snn_reversible_plugin.{framework}", framework)
    assert f"pip install 'snn-reversible-plugin[{framework}]'" in result.stderr


def test_register_without_any_framework(python):
    code = "import importlib.util as u; u.find_spec = lambda name: None; "
    result = python(
        code + "import snn_reversible_plugin as srp; srp.register()", "spikingjelly", "snntorch"
    )
    assert "pip install 'snn-reversible-plugin[spikingjelly]'" in result.stderr
