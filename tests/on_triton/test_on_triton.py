"""The Triton forms without a GPU: interpreted, and compiled for three architectures.

Whether Triton interprets is decided when kernels are imported, so they run in processes of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def run(groups: list[str], interpreted: bool, chosen: str) -> None:
    """The tests of groups that are chosen by marks: they must pass, and not be skipped one and all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    files = [str(Path(__file__).with_name(f"{group}.py")) for group in groups]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    found = result.stdout + result.stderr
    if re.search(r"\d+ skipped", found) and not re.search(r"\d+ passed", found):
        pytest.skip(found.strip())
    assert result.returncode == 0 and re.search(r"\d+ passed", found), found


def _chosen(config: pytest.Config) -> str:
    """What `make test` leaves out is left out of a group, too."""
    return "not slow" if "not slow" in config.getoption("markexpr") else ""


# Of `make test`, in one process: another one takes seconds until it has imported everything.
ALWAYS = ["interpreted_steps", "interpreted_sequences"]


def test_interpreted_kernels_give_the_bits_of_their_references(pytestconfig):
    run(ALWAYS, interpreted=True, chosen=_chosen(pytestconfig))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["interpreted_bits", "interpreted_training", "interpreted_old_releases"])
def test_other_interpreted_kernels_do(group):
    run([group], interpreted=True, chosen="")


@pytest.mark.slow
@pytest.mark.parametrize("group", ALWAYS)
def test_what_the_groups_of_make_test_leave_out(group):
    run([group], interpreted=True, chosen="slow")


def test_kernels_compile_for_gpus_to_the_arithmetic_that_is_meant(pytestconfig):
    run(["ahead_of_time"], interpreted=False, chosen=_chosen(pytestconfig))
