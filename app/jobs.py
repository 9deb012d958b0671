"""Long work on the server: it goes on when a tab is closed or reloaded, and is found again by its id. No widgets.

Each job is a thread that waits for its turn at the model (`Engine`), so jobs and previews share one queue. What a job
measures it keeps in the workspace, as it goes where it can: cancelling loses nothing that was measured.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from analysis.errors import UserError
from analysis.progress import SECONDS
from app.engine import Engine
from l2kv.errors import SpecError

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel

Work = Callable[["LoadedModel", "Job"], str]
"""(model, job, to be called as a `Progress`, which raises to cancel) -> id of the record that it made."""
Status = Literal["running", "done", "cancelled", "failed"]
GROWING = ("study", "ablation", "front", "results")
"""Kinds of records whose measurement is kept as it goes, so that the same again goes on where it was cancelled."""
_TRUSTED = 0.2  # share of the work after which its pace alone tells what is left
_MOST_ENDED = 100  # jobs that are remembered once they have ended


class CancelledError(Exception):
    """The user has cancelled the job."""


@dataclass(eq=False)
class Job:
    """Long work that was started. Read it from any thread."""

    id: str
    title: str
    """What it does: "Measuring passkeys in smollm2"."""
    kind: str
    """Kind of the record that it makes, as in `analysis.workspace.KINDS`."""
    status: Status = "running"
    stage: str = "Looking for the model …"
    """What it is doing, where that has no count."""
    done: int = 0
    total: int = 0
    """Number of steps; 0 while it is not known."""
    what: str = ""
    """What the steps are: "scores"."""
    message: str = ""
    """Why it failed."""
    result: str = ""
    """Id of the record that it made, if it is done; of one that grows as soon as it is listed."""
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    _steps_began: tuple[float, int] | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self.status == "running"

    @property
    def seconds(self) -> float:
        """Time that it has taken so far."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def seconds_left(self) -> float | None:
        """Time that it will take, by the pace of the steps so far; None before the second one.

        Where steps are seconds of an estimate, that is believed at first, and the pace as more of the work is done:
        the first steps may be unlike the later ones.
        """
        if self._steps_began is None or not self.running:
            return None
        began, first = self._steps_began
        passed, left = self.done - first, self.total - self.done
        by_pace = (time.monotonic() - began) / passed * left if passed > 0 else None
        if not self.what.startswith(SECONDS):
            return by_pace
        trust = min(passed / (_TRUSTED * self.total), 1.0)
        return left if by_pace is None else (1 - trust) * left + trust * by_pace

    @property
    def cancelling(self) -> bool:
        """Tell whether it was cancelled and has not ended yet."""
        return self.running and self._cancelled.is_set()

    def cancel(self) -> None:
        """End it at its next step, within a token or a layer. What it measured is kept."""
        self._cancelled.set()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Take note of its progress. Raises CancelledError after `cancel`."""
        self._note(done, total, what)
        if self._cancelled.is_set():
            raise CancelledError

    def _note(self, done: int, total: int, what: str) -> None:
        if not total:
            self.stage, self.total, self._steps_began = what, 0, None
            return
        same = what == self.what or (what.startswith(SECONDS) and self.what.startswith(SECONDS))
        if self.total != total or not same:
            self._steps_began = None
        if self._steps_began is None:
            self._steps_began = time.monotonic(), done
        self.stage, self.done, self.total, self.what = "", done, total, what


class Jobs:
    """The jobs of one server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, title: str, ref: str, work: Work, *, kind: str) -> Job:
        """Start a job with the model `ref`."""
        job = Job(secrets.token_hex(4), title, kind)
        with self._lock:
            ended = [one.id for one in self._jobs.values() if not one.running]
            for id in ended[:-_MOST_ENDED]:
                del self._jobs[id]
            self._jobs[job.id] = job
        threading.Thread(target=self._perform, args=(job, ref, work), name=f"job {job.id}", daemon=True).start()
        return job

    def find(self, id: str) -> Job | None:
        """Find a job; None where the server has none of that id, as after a restart."""
        return self._jobs.get(id)

    def running(self) -> Iterator[Job]:
        """All jobs that have not ended, the oldest first."""
        return (job for job in list(self._jobs.values()) if job.running)

    def _perform(self, job: Job, ref: str, work: Work) -> None:
        try:
            with self._engine.lend(ref, job) as loaded:
                job.result = work(loaded, job)
            status: Status = "done"
        except CancelledError:
            status = "cancelled"
        except (UserError, SpecError) as error:  # a SpecError: settings that do not fit this model
            status, job.message = "failed", str(error)
        except Exception:
            logging.getLogger(__name__).exception("job %s: %s", job.id, job.title)
            status = "failed"
            job.message = "Something went wrong that should not have. The server's log has the details."
        job.ended, job.status = time.monotonic(), status
