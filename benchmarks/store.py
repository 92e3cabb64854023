"""Results on disk: one JSON file an experiment and device, a line an entry, each with its circumstances.

An entry is measured again when what decides its figures has changed: settings, code, versions, device,
threads. That is how an interrupted run goes on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from .experiment import Entries, Entry

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DRAFTS = ROOT / "out" / "benchmarks"
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
DECIDING = (
    "src/snn_reversible_plugin/**/*.py",
    "benchmarks/peers/*.py",
    *(
        f"benchmarks/{name}.py"
        for name in ("networks", "workloads", "methods", "measure", "search", "training", "recordings")
    ),
)


def load(path: Path) -> Entries:
    """All entries, by "work | method"."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    for entry in stored["results"].values():
        if "context" in entry:
            entry["context"] = stored["contexts"][entry["context"]]
    return stored["results"]  # type: ignore[no-any-return]


def save(path: Path, found: Entries, order: Iterable[str] = ()) -> None:
    """Merge into what is stored, a line an entry; circumstances that several share are written once."""
    stored = load(path) | found
    contexts: list[Entry] = []
    lines = []
    for key in dict.fromkeys((*order, *stored)):
        if key in stored:
            entry = {name: value for name, value in stored[key].items() if value is not None}
            if "context" in entry:
                if entry["context"] not in contexts:
                    contexts.append(entry["context"])
                entry["context"] = contexts.index(entry["context"])
            lines.append(f"{json.dumps(key)}: {json.dumps(entry, separators=(',', ':'))}")
    shared = ",\n".join(map(json.dumps, contexts))
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(f'{{"contexts": [\n{shared}\n], "results": {{\n' + ",\n".join(lines) + "\n}}\n")
    part.replace(path)  # an interruption leaves the old file or the new one


def is_done(entry: Entry | None, settings: Entry, now: Entry | None) -> bool:
    """Whether the entry was measured with these settings, and in the present circumstances if given."""
    if entry is None or entry.get("repeats", 0) < settings.get("repeats", 0):
        return False
    if any(entry.get(name) != value for name, value in settings.items() if name != "repeats"):
        return False
    return now is None or entry.get("context") == now


def context(device: str, *files: Path) -> Entry:
    """Where and with what something is measured; ``files`` are what decides it beside ``DECIDING``."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "versions": {name: version(name) for name in ("torch", "spikingjelly", "snntorch")},
        "code": code(*files),
    }


def settle() -> None:
    """Start the process again with the allocator's settings, where it was started without.

    Memory that is freed then stays with the process. Otherwise each large tensor is mapped, faulted in page
    by page and unmapped again, and on a virtual machine that, not arithmetic, is what the clock sees.
    """
    if sys.platform == "linux" and not all(name in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)


def code(*files: Path) -> str:
    """A short name for the code that figures depend on."""
    found = {path for pattern in DECIDING for path in ROOT.glob(pattern)} | {*files}
    return _named(definitions_in(path) for path in found)


@cache
def definitions_in(path: Path) -> frozenset[str]:
    """What a file defines; files are taken not to change while this runs."""
    return frozenset(_definitions(ast.parse(path.read_text())))


def code_of(texts: Iterable[str]) -> str:
    """A short name for what source files define.

    It is made of the contents of definitions, wherever they stand: it stays when a file is renamed, a
    function moves to another, a comment or a docstring changes.

    Example:
        >>> code_of(["import a\\nx = 1", "y = 2"]) == code_of(["y = 2  # two\\nx = 1"])
        True
        >>> code_of(["x = 1"]) == code_of(["x = 2"])
        False
    """
    return _named(_definitions(ast.parse(text)) for text in texts)


def _named(files: Iterable[Iterable[str]]) -> str:
    definitions = {one for file in files for one in file}
    return hashlib.sha256("\0".join(sorted(definitions)).encode()).hexdigest()[:12]


def _definitions(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    for statement in module.body:
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield ast.unparse(statement)
        # What an import names is defined by another file, or by a version; not what else it is called here.
        elif renamed := [name for name in statement.names if name.asname]:
            yield ", ".join(map(ast.unparse, renamed))


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
