"""SpikingJelly's older releases, each imported from a folder of its own, as a bundled copy."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

HOMES = {"0.0.0.0.12": "clock_driven", "0.0.0.0.14": "activation_based"}


def folder(version):
    """Where `make venv` has put a release; a test that finds none is skipped."""
    found = Path(os.environ.get("SRP_OLD_RELEASES", Path(sys.prefix) / "old")) / f"spikingjelly-{version}"
    if not (found / "spikingjelly").exists():
        pytest.skip(f"SpikingJelly {version} is not at {found}: make venv puts it there")
    return found


def release(version, parent="bundled"):
    """Its modules, imported as those of a package that has SpikingJelly inside."""
    parent = f"{parent}_{version.replace('.', '_')}"
    if parent not in sys.modules:
        package = ModuleType(parent)
        package.__path__ = [str(folder(version))]
        sys.modules[parent] = package
    root = f"{parent}.spikingjelly.{HOMES[version]}"
    names = ("base", "neuron", "surrogate", "functional", "layer")
    return SimpleNamespace(
        version=version,
        root=root,
        **{name: importlib.import_module(f"{root}.{name}") for name in names},
    )


def make(release, kind, *, multi=True, dtype=None, **settings):
    """A neuron of the release, for sequences or for steps."""
    has_types = release.version == "0.0.0.0.12"
    if settings.get("surrogate_function") is None:
        settings["surrogate_function"] = release.surrogate.ATan()
    node = getattr(release.neuron, f"MultiStep{kind}" if has_types and multi else kind)(**settings)
    if not has_types and multi:
        node.step_mode = "m"
    return node if dtype is None else node.to(dtype)
