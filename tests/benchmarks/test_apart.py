"""A process of its own: its answer, what it says on the way, its environment, and its end."""

import os

import pytest

from benchmarks.apart import Died, apart


def told(tick, name):
    tick("half way")
    return os.getpid(), os.environ.get(name), os.environ.get("HOME")


def failing(_tick):
    raise ValueError("on purpose")


def ending(_tick):
    os._exit(3)


def test_what_it_gives_and_says():
    said = []
    pid, value, home = apart(
        told, "SRP_MARK", tick=said.append, environment={"SRP_MARK": "1", "HOME": None}
    )
    assert pid != os.getpid() and (value, home) == ("1", None) and said == ["half way"]
    assert "SRP_MARK" not in os.environ and "HOME" in os.environ


@pytest.mark.parametrize(
    ("function", "how"), [(failing, "ValueError: on purpose"), (ending, "exit code 3")]
)
def test_how_it_ended(function, how):
    with pytest.raises(Died, match=how):
        apart(function)
