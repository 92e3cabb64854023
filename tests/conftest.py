"""Fixtures of every test: a fixed seed, and one thread for each worker that runs beside others."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers beside each other that each take all cores are slower than workers with one thread.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch before each test, so that no test depends on those before it."""
    torch.manual_seed(0)
    return 0
