"""Jobs outlive the page that started them, wait their turn, say how far they are, and end when they are cancelled."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from analysis.errors import ModelError
from app import header
from app.components import progress
from app.jobs import Job, Jobs


class OneAtATime:
    """An engine that lends a model to one job after another."""

    def __init__(self):
        self.lock = threading.Lock()

    @contextmanager
    def lend(self, ref, progress):
        if ref == "missing":
            raise ModelError("There is no model 'missing'.")
        while not self.lock.acquire(timeout=0.01):
            progress(0, 0, "Waiting: 1 ahead of you")
        try:
            yield f"the model {ref}"
        finally:
            self.lock.release()


@pytest.fixture
def jobs():
    return Jobs(OneAtATime())


def ended(job):
    for _ in range(1000):
        if not job.running:
            return job
        time.sleep(0.005)
    raise AssertionError(f"{job.title} goes on: {job.stage} {job.done} of {job.total}")


def test_a_job_is_found_again_by_its_id_with_what_it_made(jobs):
    job = jobs.start("Capturing", "toy", lambda loaded, progress: f"made by {loaded}", kind="run")
    assert ended(jobs.find(job.id)) is job
    assert (job.status, job.result, job.kind) == ("done", "made by the model toy", "run")
    assert jobs.find("another") is None and list(jobs.running()) == []


def test_one_works_and_the_others_say_that_they_wait(jobs):
    go = threading.Event()
    first = jobs.start("first", "toy", lambda loaded, progress: go.wait(5) and "1", kind="run")
    time.sleep(0.05)
    second = jobs.start("second", "toy", lambda loaded, progress: "2", kind="run")
    time.sleep(0.1)
    assert second.stage == "Waiting: 1 ahead of you" and [job.title for job in jobs.running()] == ["first", "second"]
    go.set()
    assert ended(first).result == "1" and ended(second).result == "2"


@pytest.mark.parametrize(
    ("jobs", "in_queue", "told"),
    [(1, 1, "1 job running"), (2, 2, "1 job running · 1 waiting"), (1, 2, "1 job running · 1 waiting"), (0, 1, "free")],
)
def test_the_header_counts_a_job_that_waits_as_waiting_alone(jobs, in_queue, told):
    engine, started = SimpleNamespace(loaded=None, waiting=in_queue), SimpleNamespace(running=lambda: iter(range(jobs)))
    assert header.status(engine, started)[0].endswith(told)


def test_the_header_says_how_long_a_run_is_before_its_name_which_may_be_cut(monkeypatch):
    run = SimpleNamespace(name="Weather ledgers (mine)", about="69 tokens")
    monkeypatch.setattr(header.state, "run_id", lambda: "1")
    monkeypatch.setattr(header.library, "find", {"1": run}.get)
    assert header._run_label().replace("\\", "") == "69\N{NO-BREAK SPACE}tokens · Weather ledgers (mine)"


def test_cancelling_ends_it_at_its_next_step_also_while_it_waits(jobs):
    def steps(loaded, progress):
        for i in range(10_000):
            progress(i, 10_000, "steps")
            time.sleep(0.002)

    first, waiting = (jobs.start(name, "toy", steps, kind="run") for name in ("first", "waiting"))
    time.sleep(0.05)
    for job in (waiting, first):
        job.cancel()
        assert ended(job).status == "cancelled"
    assert 0 < first.done < 10_000 and waiting.done == 0


def test_a_cancel_is_told_at_once_and_the_step_that_it_ends_at_is_counted(jobs):
    begun, go = threading.Event(), threading.Event()

    def steps(loaded, job):
        begun.set()
        go.wait(5)
        job(3, 10, "scores")  # which are on disk
        raise AssertionError("it goes on")

    job = jobs.start("steps", "toy", steps, kind="results")
    begun.wait(5)
    assert not job.cancelling
    job.cancel()
    assert job.cancelling and progress.told(job).startswith("Cancelling")
    go.set()
    assert ended(job).status == "cancelled" and not job.cancelling and job.done == 3


def test_the_time_left_goes_by_the_pace_of_the_steps_and_not_by_the_loading_before_them(jobs):
    told = threading.Event()

    def steps(loaded, progress):
        time.sleep(0.3)
        for i in range(5):
            progress(i, 20, "texts")
            time.sleep(0.02)
        told.wait(5)
        return ""

    job = jobs.start("steps", "toy", steps, kind="study")
    assert job.seconds_left is None
    while job.done < 4:
        time.sleep(0.001)
    assert 16 * 0.02 <= job.seconds_left < 16 * 0.075
    told.set()
    ended(job)
    assert job.seconds_left is None


def test_an_estimate_is_believed_until_a_fifth_of_the_work_is_done_and_then_the_pace(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("app.jobs.time.monotonic", lambda: now)
    job = Job("id", "it", "results")
    for done, at, left in (
        (0, 1000.0, 100),
        (2, 1040.0, 0.9 * 98 + 0.1 * (40 / 2 * 98)),  # 20 times as slow, of which a tenth is believed
        (20, 1060.0, 60 / 20 * 80),
        (50, 1150.0, 150 / 50 * 50),
    ):
        now = at
        job(done, 100, f"s of work ({'plan' if done < 20 else 'lm'})")
        assert job.seconds_left == pytest.approx(left)


def test_a_users_mistake_is_told_and_a_bug_of_ours_is_not_dressed_up_as_one(jobs, caplog):
    missing = ended(jobs.start("a", "missing", lambda loaded, progress: "", kind="run"))
    assert (missing.status, missing.message) == ("failed", "There is no model 'missing'.")
    bug = ended(jobs.start("b", "toy", lambda loaded, progress: 1 / 0, kind="run"))
    assert bug.status == "failed" and "should not have" in bug.message and "ZeroDivisionError" in caplog.text


def test_the_engine_goes_on_after_a_job_that_failed(jobs):
    ended(jobs.start("b", "toy", lambda loaded, progress: 1 / 0, kind="run"))
    assert ended(jobs.start("c", "toy", lambda loaded, progress: "c", kind="run")).result == "c"


def test_a_job_that_is_started_beside_another_hides_neither(monkeypatch, jobs):
    from app import state

    go, held = threading.Event(), {}
    monkeypatch.setattr("streamlit.session_state", held)
    both = [jobs.start(name, name, lambda loaded, progress: go.wait(5) and "", kind="results") for name in ("a", "b")]
    for job in both:
        state.follow(job.id)
    assert progress.current(jobs, on_done=held.clear) == both == [jobs.find(id) for id in state.JOBS.get()]
    assert progress.running(jobs, "results") is both[1] and progress.running(jobs, "speed") is None
    go.set()
    done = []
    assert [ended(job).title for job in both] == ["a", "b"]
    assert progress.current(jobs, on_done=done.append) == both == done and state.JOBS.get() == ()
