"""The README says what was measured: its table is the one that the stored results give."""

import json
from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).parent.parent


def test_the_table_is_the_stored_results():
    stored = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())["results"]
    text = (ROOT / "README.md").read_text()
    written = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert written == readme.table(stored)
    assert all(entry["gradient_difference"] in (0, None) for entry in stored.values())


def test_linked_files_exist():
    import re

    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
