"""The fast part of the tests in every environment that is claimed: a table in docs/compatibility.md.

The one idea: uv makes an environment for the length of one command, and its cache holds one torch at a
time, since a CUDA build with its libraries takes 6 GB. Source: the ranges of versions in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "out" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
OLD = Path(sys.prefix) / "old"  # older releases of SpikingJelly, which every environment runs too
START, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"

NAMES = ("torch", "Python", "SpikingJelly", "snnTorch", "numba")
# What every supported version has to pass: the mechanisms, each framework's neurons, and the compiler's
# graphs, in three minutes.
TESTS = (
    "grid/test_grid.py", "ops/test_bits.py", "tape/test_tape.py", "test_convert.py", "test_import.py",
    "neurons/integrate_fire/test_gradients.py", "neurons/on_grid/test_reversal.py",
    "spikingjelly/test_neurons.py", "spikingjelly/test_old_releases.py", "snntorch/test_neurons.py",
    "snntorch/test_convert.py", "compiler/test_pass.py", "compiler/test_membranes.py",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """What is asked for: requirements on torch, Python and snnTorch, and whether numba is there."""

    torch: str
    python: str
    snntorch: str
    numba: bool

    @property
    def command(self) -> list[str]:
        extras = "spikingjelly,snntorch" + (",fast" if self.numba else "")
        wanted = (f"torch{self.torch}", f"snntorch{self.snntorch}", "pytest", "hypothesis")
        return [
            *(sys.executable, "-m", "uv", "run", "--isolated", "--no-project", "--no-python-downloads"),
            *("--cache-dir", str(CACHE), "--python", interpreter(self.python)),
            *("--with-editable", f".[{extras}]"),
            *(word for each in wanted for word in ("--with", each)),
            *("python", "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)),
        ]

    def run(self) -> tuple[str, bool]:
        """A row of the table, and whether all is well."""
        environment = {**os.environ, "SRP_OLD_RELEASES": str(OLD)}
        done = subprocess.run(
            self.command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
        )
        header = re.search(r"^versions: (.*)$", done.stdout, re.MULTILINE)
        if not header:
            asked = (self.torch or "newest", self.python, "", self.snntorch, "")
            return row(*asked, f"not to be had: {reason(done.stderr + done.stdout)}"), False
        found = dict(re.findall(r"(\w+) ([^,\s]+)", header[1]))
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
        result = "; ".join([", ".join(counts), *(f"`{test}`" for test in failed)])
        versions = [found.get(name, "absent") for name in NAMES]
        versions[NAMES.index("SpikingJelly")] += "".join(f", {version}" for version in old_releases())
        return row(*versions, result), done.returncode == 0


# Every version of everything, not every pair of them; of torch "" is the newest release.
ENVIRONMENTS = (
    Environment("==2.14.*", "3.11", "==1.*", numba=True),
    Environment("==2.14.*", "3.13", "==0.9.4", numba=False),
    Environment("==2.9.*", "3.12", "==1.*", numba=True),
    Environment("==2.6.*", "3.11", "==0.9.1", numba=True),
    Environment("", "3.13", "==1.*", numba=True),
)


def old_releases() -> list[str]:
    """The older releases of SpikingJelly that `make venv` has installed aside."""
    return sorted(path.name.removeprefix("spikingjelly-") for path in OLD.glob("spikingjelly-*"))


def interpreter(version: str) -> str:
    """pyenv's where it has one, whose shims answer for one version alone: uv stops at those that don't."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return str(next((root / "versions").glob(f"{version}.*/bin/python"), version))


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |\n"


def reason(output: str) -> str:
    """Why uv, or the start of Python, gave no environment: its error, on one line of the table."""
    found = re.search(r"error: (.*)", output, re.DOTALL)
    return " ".join((found[1] if found else output).split())[-300:].replace("|", "/")


def rows() -> Iterator[tuple[str, bool]]:
    """Every row, as it comes; the environments of one torch share a cache, then it goes."""
    for _, group in groupby(ENVIRONMENTS, key=lambda environment: environment.torch):
        try:
            for environment in group:
                yield environment.run()
        finally:
            shutil.rmtree(CACHE, ignore_errors=True)


def main() -> int:
    """Run all, print and store the table; 1 where a test failed or an environment was not to be had."""
    table, good = row(*NAMES, f"on {date.today():%d %B %Y}") + row(*["---"] * 6), True
    print(table, end="", flush=True)
    for line, fine in rows():
        print(line, end="", flush=True)
        table, good = table + line, good and fine
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table + END + rest.partition(END)[2])
    return not good


if __name__ == "__main__":
    sys.exit(main())
