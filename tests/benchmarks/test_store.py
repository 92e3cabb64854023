"""Stored results: kept and skipped until something changes, and moving code is no change."""

import doctest
import json

import pytest

from benchmarks import pages, search, store, tables
from benchmarks.store import code_of

NOW = {"device": "", "threads": 1, "versions": {"torch": "2"}, "code": "a"}
SETTINGS = {"shape": [2, 3], "repeats": 5}


@pytest.mark.parametrize("module", [pages, search, store, tables])
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_what_is_saved_is_loaded_in_order_a_line_an_entry(tmp_path):
    path, shared = tmp_path / "cpu.json", {"context": NOW}
    order = ["net | stock", "net | memory"]
    memory, stock = {"held": 1} | shared, {"held": 2} | shared
    store.save(path, {"net | memory": {"why_not": None} | memory}, order)
    store.save(path, {"net | stock": stock, "more | stock": {"held": 3}}, order)
    expected = {"net | stock": stock, "net | memory": memory, "more | stock": {"held": 3}}
    assert list(store.load(path).items()) == list(expected.items())
    assert json.loads(path.read_text())["contexts"] == [NOW]
    assert len([line for line in path.read_text().splitlines() if "held" in line]) == 3
    assert store.load(tmp_path / "none.json") == {}


def test_an_entry_is_done_until_something_that_decides_changes():
    entry = SETTINGS | {"date": "then", "context": NOW}
    assert store.is_done(entry, SETTINGS, NOW) and store.is_done(entry, SETTINGS | {"repeats": 3}, NOW)
    assert not store.is_done(None, SETTINGS, NOW)
    for changed in ({"shape": [2, 4]}, {"repeats": 7}, {"more": 1}):
        assert not store.is_done(entry, SETTINGS | changed, NOW)
    for key, value in {"code": "other", "threads": 99, "versions": {}}.items():
        assert not store.is_done(entry, SETTINGS, NOW | {key: value}), key
        assert store.is_done(entry, SETTINGS, None)


SOURCE = '''"""About."""
from torch import nn

WIDTH = 3

def net():
    """A net."""
    return nn.Linear(WIDTH, 3)
'''


@pytest.mark.parametrize(
    "texts",
    [
        [SOURCE.replace("About", "Otherwise").replace("A net", "One net")],
        [SOURCE + "# what it is for\n", ""],
        [
            "from torch import nn\nfrom elsewhere import WIDTH\ndef net(): return nn.Linear(WIDTH, 3)",
            "WIDTH = 3",
        ],
    ],
)
def test_words_and_moves_change_no_code(texts):
    assert code_of(texts) == code_of([SOURCE])


@pytest.mark.parametrize(
    "text",
    [
        SOURCE.replace("3)", "4)"),
        SOURCE.replace("= 3", "= 4"),
        SOURCE + "OTHER = 1",
        SOURCE.replace("import nn", "import cnn as nn"),
    ],
)
def test_what_is_computed_otherwise_is_other_code(text):
    assert code_of([text]) != code_of([SOURCE])


def test_a_result_survives_the_move_of_a_file(tmp_path, monkeypatch):
    """Renamed, a file that decides has the same key; changed, it has another."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(store, "DECIDING", ("*.py", "*/*.py"))

    def code():
        store.definitions_in.cache_clear()
        return store.code()

    (tmp_path / "networks.py").write_text(SOURCE)
    entry = SETTINGS | {"context": NOW | {"code": code()}}
    (tmp_path / "folder").mkdir()
    (tmp_path / "networks.py").rename(tmp_path / "folder" / "nets.py")
    assert store.is_done(entry, SETTINGS, NOW | {"code": code()})
    (tmp_path / "folder" / "nets.py").write_text(SOURCE.replace("3)", "4)"))
    assert not store.is_done(entry, SETTINGS, NOW | {"code": code()})


def test_every_pattern_of_what_decides_names_files():
    assert all([*store.ROOT.glob(pattern)] for pattern in store.DECIDING)
