"""Progress of long work: the one callback type, which also cancels. Knows nothing of the work, and shows nothing."""

from __future__ import annotations

from typing import Protocol

SECONDS = "s of work"
"""What is counted where steps are seconds of an estimate; the stage may follow in brackets."""


class Progress(Protocol):
    """Callback (done, total, what is counted, such as "layers"), after each step and now and then during long ones.

    An exception that it raises cancels the work at once and passes through to the caller.
    """

    def __call__(self, done: int, total: int, what: str, /) -> object:
        """Report that `done` of `total` things are done; `what` names them."""


def unheard(done: int, total: int, what: str, /) -> None:
    """Ignore all progress."""


def part_of(progress: Progress, start: int, total: int, what: str = "") -> Progress:
    """Report the progress of a part as that of the whole: `start` steps came before it, of `total` in all.

    Args:
        what: what the whole counts; by default, what the part counts.
    """
    return lambda done, _, counted: progress(min(start + done, total), total, what or counted)
