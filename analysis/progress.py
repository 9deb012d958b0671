"""How far long work is: the one callback type, which also cancels. Knows nothing of the work, and shows nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as (done, total, what is counted: "layers") after each step, and with the same numbers during long ones.

    What it raises cancels the work and passes through, so that a caller need not wait for a step to end.
    """

    def __call__(self, done: int, total: int, what: str, /) -> object:
        """Hear that `done` of `total` things are done; `what` names them."""


def unheard(done: int, total: int, what: str, /) -> None:
    """The progress of work that nobody watches."""


def part_of(progress: Progress, start: int, total: int, what: str = "") -> Progress:
    """The progress of a part, told as that of the whole: `start` steps came before it, of `total` in all.

    Args:
        what: is counted in the whole; without it, what the part itself counts.
    """
    return lambda done, _, counted: progress(min(start + done, total), total, what or counted)
