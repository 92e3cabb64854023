"""The wheel as users get it: built, checked, installed with each extra on its own, and run.

The one idea: what a checkout hides (a file that is not packaged, an extra that lacks a library, an import
that only the tests' environment has) shows where there is nothing but the wheel. Each environment lives for
one check. torch is 6 GB, so the torch of this environment is lent to those of the same Python, by links;
for another Python, and with ``--clean``, all of it is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from matrix import interpreter

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
EXTRAS = ("", "spikingjelly", "snntorch", "data", "plot", "fast", "all")
PYTHONS = ("3.11", "3.13")
LENT = (
    "torch",
    "triton",
    "nvidia",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "filelock",
    "fsspec",
)
MOST_SECONDS = 1.0  # of importing the package beyond torch

IMPORT = """
import time, torch
start = time.process_time()
import snn_reversible_plugin as srp
seconds = time.process_time() - start
assert "site-packages" in srp.__file__, srp.__file__
from importlib.metadata import version
print(f"{version('snn-reversible-plugin')} imported in {seconds:.2f} s beyond torch")
"""
USES = {
    "": "net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())\n"
    "import warnings; warnings.simplefilter('ignore')\n"
    "srp.convert_to_reversible(net)(torch.rand(4, 8)).sum().backward()",
    "spikingjelly": "from spikingjelly.activation_based import neuron\n"
    "net = torch.nn.Sequential(torch.nn.Linear(8, 8), neuron.LIFNode())\n"
    "assert srp.verify(srp.convert_to_reversible(net), torch.rand(4, 8)).ok",
    "snntorch": "import snntorch\n"
    "net = torch.nn.Sequential(torch.nn.Linear(8, 8), snntorch.Leaky(0.9, init_hidden=True))\n"
    "assert srp.verify(srp.convert_to_reversible(net), torch.rand(4, 8)).ok",
    "data": "from snn_reversible_plugin.data import DigitSaccades, event_frames\n"
    "x, y = next(iter(event_frames(DigitSaccades(size=16, limit=4), steps=4, batch_size=2)))\n"
    "assert x.shape == (4, 2, 2, 16, 16)",
    "plot": "from snn_reversible_plugin.reports.pictures import new_figure\nnew_figure(2, 2)",
    "fast": "from snn_reversible_plugin.ops import forms\nimport numba",
}
DEMO = (
    "demo",
    "--epochs",
    "1",
    "--steps",
    "4",
    "--batch",
    "8",
    "--width",
    "4",
    "--size",
    "16",
    "--limit",
    "16",
)


@dataclass
class Environment:
    """A virtual environment in a folder, with nothing but the wheel and what it asks for."""

    folder: Path
    python: str
    clean: bool

    @property
    def program(self) -> Path:
        return self.folder / "bin" / "python"

    def make(self, wheel: Path, extra: str) -> None:
        """Raises: CalledProcessError: something can't be installed."""
        uv = [sys.executable, "-m", "uv"]
        command(*uv, "venv", "--quiet", "--python", interpreter(self.python), str(self.folder))
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        overrides: list[str] = []
        if not self.clean:
            # torch and what it needs are there: uv is told to leave them out.
            without = self.folder / "lent.txt"
            without.write_text("".join(f"{name} ; python_version < '3'\n" for name in ("torch", "triton")))
            overrides = ["--overrides", str(without)]
        command(*uv, "pip", "install", "--quiet", "--python", str(self.program), *overrides, wanted)
        if not self.clean:
            self._lend()

    def _lend(self) -> None:
        """Only torch and what it imports, by links: everything else has to come with the wheel."""
        ours = Path(next(p for p in sys.path if p.endswith("site-packages")))
        theirs = next(self.folder.glob("lib/python*/site-packages"))
        for name in LENT:
            for path in (*ours.glob(name), *ours.glob(f"{name}-*"), *ours.glob(f"{name}gen")):
                if not (theirs / path.name).exists():
                    (theirs / path.name).symlink_to(path)

    def run(self, *arguments: str) -> str:
        return command(str(self.program), *arguments, cwd=self.folder)


def command(*words: str, cwd: Path = ROOT) -> str:
    """What it prints; its errors are shown where it fails."""
    names = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=names, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
        done.check_returncode()
    return done.stdout


def built() -> Path:
    """The wheel, built from the sdist beside it; both pass ``twine check``."""
    shutil.rmtree(DIST, ignore_errors=True)
    command(sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT))
    files = sorted(map(str, DIST.iterdir()))
    print(command(sys.executable, "-m", "twine", "check", "--strict", *files).strip())
    return next(DIST.glob("*.whl"))


def check(wheel: Path, python: str, extra: str, clean: bool) -> str:
    """What was seen of one environment; raises where something is wrong."""
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        environment = Environment(Path(folder), python, clean)
        environment.make(wheel, extra)
        said = environment.run("-c", IMPORT).strip()  # and writes bytecode
        seconds = min(_seconds(environment.run("-c", IMPORT)) for _ in range(3))
        if seconds > MOST_SECONDS:
            raise AssertionError(
                f"importing took {seconds:.2f} s beyond torch, {MOST_SECONDS} s is the most"
            )
        for name in USES if extra == "all" else ("", extra):
            environment.run("-c", f"import torch, snn_reversible_plugin as srp\n{USES[name]}")
        environment.run("-m", "snn_reversible_plugin")
        if extra == "all":
            said += (
                "; " + environment.run("-m", "snn_reversible_plugin", *DEMO).strip().splitlines()[0].strip()
            )
            if not (Path(folder) / "demo.png").exists():
                raise AssertionError("the demo left no picture")
        return f"{said}; {seconds:.2f} s the next time"


def _seconds(said: str) -> float:
    return float(said.split(" in ")[1].split()[0])


def main() -> int:
    """1 where an environment can't be made, or what is in it does not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="*", default=PYTHONS)
    parser.add_argument("--extra", nargs="*", default=EXTRAS, help="'' is none")
    parser.add_argument("--clean", action="store_true", help="install torch too, 6 GB an environment")
    asked = parser.parse_args()
    wheel, good = built(), True
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for python in asked.python:
        # Another Python can't use this one's torch: one environment with everything stands for all.
        lent = python == here and not asked.clean
        for extra in asked.extra if lent or asked.clean else ("all",):
            try:
                said = check(wheel, python, extra, clean=not lent)
            except (subprocess.CalledProcessError, AssertionError) as error:
                said, good = f"FAILED: {error}", False
            print(f"Python {python}, [{extra}]: {said}", flush=True)
    return not good


if __name__ == "__main__":
    sys.exit(main())
