"""Random programs for a while, ``python -m fuzz --seconds 3600``: what fails, and what was run."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from fuzz.compare import REFUSED, SAME, shortened, verdict
from fuzz.loops import loop_program
from fuzz.program import Program, script
from fuzz.stacks import stack_program


def program_of(seed: int) -> Program:
    """Loops and stacks by turns."""
    return (loop_program if seed % 2 else stack_program)(seed)


def main() -> int:
    """How many programs failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) * 1000, help="of the first program")
    parser.add_argument("--stop", type=int, default=5, help="after so many failures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seeds from {options.seed} on, for {options.seconds:.0f} s", flush=True)
    verdicts: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    end, seed = time.monotonic() + options.seconds, options.seed
    while time.monotonic() < end and verdicts["failed"] < options.stop:
        program = program_of(seed)
        found = verdict(program.source, program.settings)
        kind = found if found == SAME else REFUSED if found.startswith(REFUSED) else "failed"
        verdicts[kind] += 1
        if kind == "failed":
            print(f"\n# {found}")
            print(script(shortened(program.source, program.settings), program.settings, seed), flush=True)
        elif kind == SAME:
            covered.update(program.features)
        seed += 1
    print(f"{seed - options.seed} programs: " + ", ".join(f"{n} {kind}" for kind, n in verdicts.items()))
    for feature, count in sorted(covered.items()):
        print(f"{count:6d}  {feature}")
    return verdicts["failed"]


if __name__ == "__main__":
    sys.exit(min(main(), 1))
