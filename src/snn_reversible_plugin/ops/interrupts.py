"""What an interrupt between two bytecodes leaves behind, found and put right by the next call.

The one idea: Ctrl-C can come between taking something away and noting that it is gone, and in the code that
would put it back. So what is taken is noted before it is taken, by thread; and whoever starts next looks at
what is noted: if nobody who noted it is still running, it is put back then.

Source: this package's own; when CPython looks for signals, in its ``ceval.c``.
"""

from __future__ import annotations

import enum
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

# NOTE [Who is still running]
#
# 1. A context manager is over when it is gone: a `with` statement holds it. It is over too when the frame
#    with that statement has left this thread's stack; then an interrupt's traceback may still hold both.
# 2. The frame of a generator is on no stack while what is inside runs. Where contextlib drives it, the
#    frame that counts is the one that has contextlib's context manager in a `with`; elsewhere the first
#    of the two has to do.

_local = threading.local()


class Left(enum.Enum):
    """How a context manager was left: what is put back may depend on it."""

    PLAINLY = "nothing was raised"
    BY_EXCEPTION = "an exception, or an interrupt, has just ended what was inside"
    UNSEEN = "an interrupt kept it from putting back, a while ago: the user may have set things since"


class _Taken(NamedTuple):
    """Something that is to be put back: by whom, and how."""

    owner: weakref.ref[Any]
    frame: FrameType | None
    put_back: Callable[[Left], None]


def _all_taken() -> list[_Taken]:
    taken: list[_Taken] | None = getattr(_local, "taken", None)
    if taken is None:
        taken = _local.taken = []
    return taken


class Restoring:
    """Base of context managers that put something back on leaving, or after an interrupt, later.

    ``__enter__`` calls :meth:`taking` before it takes anything, ``__exit__`` :meth:`put_back`.
    """

    __slots__ = ("__weakref__", "_taken")

    def taking(self, put_back: Callable[[Left], None]) -> None:
        """Note how to put back what is about to be taken.

        Args:
            put_back: may be called when a part or nothing was taken, and twice, and must not hold this
                object.
        """
        taken = _Taken(weakref.ref(self), _with_the_statement(sys._getframe(2)), put_back)
        _all_taken().append(taken)
        self._taken = taken

    def put_back(self, failed: bool) -> None:
        """Put it back now; ``failed``: because of an exception."""
        how = Left.BY_EXCEPTION if failed else Left.PLAINLY
        try:
            self._taken.put_back(how)
        except KeyboardInterrupt:
            self._taken.put_back(Left.BY_EXCEPTION)
            raise
        taken = _all_taken()
        taken[:] = [one for one in taken if one is not self._taken]


def _with_the_statement(frame: FrameType | None) -> FrameType | None:
    """The frame that waits for what is inside a context manager; None where it can't be told."""
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        frame = frame.f_back
        if frame is None or not (_is_contextlib(frame) and frame.f_code.co_name == "__enter__"):
            return None
        frame = frame.f_back
    return None if frame is None or _is_contextlib(frame) else frame


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"


class PuttingBack(Restoring):
    """Context manager: on leaving, or after an interrupt later, ``put_back(how)`` is called.

    Example:
        >>> with PuttingBack(lambda how: print(how.value)):
        ...     pass
        nothing was raised
    """

    __slots__ = ("_function",)

    def __init__(self, put_back: Callable[[Left], None]) -> None:
        self._function = put_back

    def __enter__(self) -> None:
        self.taking(self._function)

    def __exit__(self, *exc: object) -> None:
        self.put_back(exc[0] is not None)


def put_back_interrupted() -> None:
    """Put back what somebody took on this thread who is no longer running."""
    taken = getattr(_local, "taken", None)
    if not taken:
        return
    running = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(id(frame))
        frame = frame.f_back
    for one in reversed(taken[:]):
        if one.owner() is None or (one.frame is not None and id(one.frame) not in running):
            one.put_back(Left.UNSEEN)
            taken[:] = [other for other in taken if other is not one]


class Switch:
    """A flag of each thread, that is on as long as those are there who turned it on.

    Example:
        >>> careful = Switch()
        >>> with careful.on():
        ...     careful.is_on()
        True
        >>> careful.is_on()
        False
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def is_on(self) -> bool:
        """Whether it is on, on this thread."""
        ref = getattr(self._local, "ref", None)
        return ref is not None and ref() is not None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Context manager: inside, it is on."""
        before, there = getattr(self._local, "ref", None), _There()
        try:
            self._local.ref = weakref.ref(there)
            yield
        finally:
            self._local.ref = before


class _There:
    __slots__ = ("__weakref__",)


def surely(put_back: Callable[[], None]) -> None:
    """Call what may be called twice, and an interrupt that comes in it comes after it."""
    try:
        put_back()
    except KeyboardInterrupt:
        put_back()
        raise
