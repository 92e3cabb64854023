"""Public names: each is on a page of the reference, and has an example, which the doctests run."""

import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

PACKAGE = "snn_reversible_plugin"
PAGES = Path(__file__).parents[1] / "docs" / "api"
ROOMS = (
    PACKAGE,
    *(f"{PACKAGE}.{room}" for room in ("spikingjelly", "snntorch", "models", "training", "grid", "data")),
)
COMPILES = {
    f"{PACKAGE}.reports.compiled.CompiledVerification": "an example would compile for half a minute"
}
# "::: a.name", and the indented options below it.
ENTRY = re.compile(r"^::: ([\w.]+)\n((?: +.*\n)*)", re.MULTILINE)


def documented():
    """The names that the pages show."""
    names = set()
    for page in PAGES.glob("*.md"):
        for name, options in ENTRY.findall(page.read_text() + "\n"):
            members = re.search(r"members: \[(.*)\]", options)
            if members:
                names |= {f"{name}.{member}" for member in re.findall(r"\w+", members[1])}
            elif inspect.ismodule(found := named(name)):
                names |= {f"{name}.{member}" for member in found.__all__}
            else:
                names.add(name)
    return names


def named(path):
    room, _, name = path.rpartition(".")
    # A room's function may be called as the file that it stands in.
    return getattr(importlib.import_module(room), name, None) or importlib.import_module(path)


PUBLIC = sorted(
    {f"{room}.{name}" for room in ROOMS for name in importlib.import_module(room).__all__} | documented()
)


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_has_an_example_that_runs(path):
    if path in COMPILES:
        pytest.skip(COMPILES[path])
    assert ">>>" in (inspect.getdoc(named(path)) or ""), f"{path} has no example"


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_is_in_the_reference(path):
    # A name that several rooms hand on stands once.
    shown = {id(named(one)) for one in documented()}
    assert id(named(path)) in shown, f"{path} is on no page of docs/api"


def test_roles_of_docstrings_are_links_of_the_site():
    shown = runpy.run_path(str(PAGES.parents[1] / "tools" / "roles.py"))["shown"]
    page = "<p>:func:<code>~a.verify</code>, :mod:<code>.grid.products</code>, :math:<code>x.y</code>::</p>"
    assert shown(page, {"verify": "srp.verify"}) == (
        '<p><autoref optional identifier="srp.verify"><code>verify</code></autoref>, '
        "<code>products</code>, <code>x.y</code>:</p>"
    )
