"""README and docs say what was measured: every number with a unit comes from a stored result."""

import re
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pages, pictures, store

ROOT = Path(__file__).parents[2]
PAGES = pages.pages()
RESULTS = {
    "cpu": {
        "net | stock": {"held": 6 * 2**20, "time_ratio": 1.0},
        "net | memory": {"held": 2**20, "time_ratio": 1.25},
    },
    "more": {"runs": [{"accuracy": 0.875}]},
}


def names(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_numbers_are_those_of_the_results(page):
    assert not pages.problems(page.read_text(), pages.load_all())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=names)
def test_linked_files_exist(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_an_index_shows_no_link_that_is_dead_there():
    """What the build makes of the README: sdist and wheel have no files beside it."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    text = (ROOT / "README.md").read_text()
    assert re.search(r"\]\((?!http)", text) and "<img" in text
    for one in metadata["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    assert not re.findall(r"\]\((?!http)|<img|<source", text)
    assert "Move a SpikingJelly script" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pictures_show_the_results(device):
    entries = store.load(store.RESULTS / f"{device}.json")
    for path, shown in pictures.of_steps(entries, pictures.IMAGES, device).items():
        assert Image.open(path).text["Results"] == pictures.digest(shown), path.name


def test_the_tape_gives_stock_gradients():
    entries = store.load(store.RESULTS / "cpu.json").values()
    ours = [e for e in entries if e["method"] in ("speed", "memory") and "held" in e]
    assert ours
    assert all(e["gradient_difference"] == 0 for e in ours)


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("cpu/net | stock/held over cpu/net | memory/held as .2f x", "6.00x"),
        ("cpu/net | memory/held as .1f MiB", "1.0 MiB"),
        ("cpu/net | memory/held as ,d bytes", "1,048,576 bytes"),
        ("more/runs/0/accuracy as .1%", "87.5%"),
    ],
)
def test_values_are_filled_and_held_to_the_results(asked, written):
    text = f"It is <!-- value: {asked} --><!-- end --> here."
    filled = pages.rendered(text, RESULTS)
    assert filled == f"It is <!-- value: {asked} -->{written}<!-- end --> here."
    assert not pages.problems(filled, RESULTS)
    assert pages.problems(filled.replace(written, "7.77x"), RESULTS)  # stale


def test_a_value_that_would_end_its_paragraph_is_found():
    text = pages.rendered("It is\n<!-- value: cpu/net | memory/held as .1f MiB --><!-- end -->.", RESULTS)
    assert any("begins a line" in problem for problem in pages.problems(text, RESULTS))


def test_a_value_from_nowhere_is_an_error():
    with pytest.raises(KeyError, match=r"ends at \'net \| grid\'"):
        pages.rendered("<!-- value: cpu/net | grid/held as .1f x --><!-- end -->", RESULTS)


@pytest.mark.parametrize(
    ("text", "loose"),
    [
        ("Holds 27x less in 1.08x the time.", ["27x", "1.08x"]),
        ("A peak of 116.9 MiB, 8 MB an image, and 12,319 flips.", ["116.9 MiB", "8 MB", "12,319 flips"]),
        ("| vgg | 19.4 MiB | 3 % |", ["19.4 MiB", "3 %"]),
        ("A 3x3 convolution on 8x16x2x32x32, `4x`, [two](a-2x.md), version 2.0, T = 100.", []),
        ("<!-- a 2x note -->\n```\n5 MiB\n```\n", []),
        ("A spike is 1 bit.", []),
    ],
)
def test_numbers_in_prose_need_a_source(text, loose):
    assert pages.loose_numbers(text) == loose


def test_what_counts_as_not_measured_is_still_said():
    said = "".join(page.read_text() for page in PAGES)
    assert all(phrase in said for phrase in pages.NOT_MEASURED)
