"""A job on a page: what it is doing, how long it will still take, and its Cancel button."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from analysis.words import duration
from app import state
from app.components import markup
from app.jobs import GROWING, Job, Jobs

_EVERY = 0.5  # seconds between two looks at a job


def told(job: Job) -> str:
    """Say how far a job is: "3 of 24 texts, about 2 min left"."""
    if job.cancelling:
        return "Cancelling: it stops after the step that it is at."
    if not job.total:
        return job.stage
    left = job.seconds_left
    return f"{job.done:,} of {job.total:,} {job.what}" + (f", about {duration(left)} left" if left is not None else "")


def current(jobs: Jobs, *, on_done: Callable[[Job], object]) -> list[Job]:
    """Find the jobs that the address names; it forgets those that have ended. Call it before a page is drawn.

    Args:
        on_done: called once for each that is done, or was cancelled and has made something.
    """
    found = {id: jobs.find(id) for id in state.JOBS.get()}
    if None in found.values():
        state.notice(
            "This server has no job of the address: it was started elsewhere, or before the server was. What a job "
            "measured is kept."
        )
    here = [job for job in found.values() if job]
    state.JOBS.set(tuple(job.id for job in here if job.running))
    for job in here:
        if job.status == "done" or (job.status == "cancelled" and job.result):
            on_done(job)
    return here


def running(jobs: Jobs, kind: str) -> Job | None:
    """Find the latest job of this session that makes a kind of record and has not ended."""
    found = (jobs.find(id) for id in reversed(state.JOBS.get()))
    return next((job for job in found if job and job.running and job.kind == kind), None)


def draw(jobs: list[Job]) -> None:
    """Draw how far each job is, or once, how it ended."""
    for job in jobs:
        if job.running:
            st.fragment(_running, run_every=_EVERY)(job)
        else:
            _end(job)


def _running(job: Job) -> None:
    if not job.running:
        st.rerun()
    with st.container(border=True, key=f"job_{job.id}", horizontal=True, vertical_alignment="center"):
        share = min(job.done / job.total, 1.0) if job.total else 0.0
        st.progress(share, f"{markup.plain(job.title)}: {markup.plain(told(job))}")
        st.button(
            "Cancel", icon=":material/cancel:", key=f"job_cancel_{job.id}", on_click=job.cancel, disabled=job.cancelling
        )


def _end(job: Job) -> None:
    title, took = markup.plain(job.title), duration(job.seconds)
    if job.status == "done":
        st.toast(f"{title}: done in {took}.", icon=":material/check:")
    elif job.status == "cancelled":
        st.info(f"{title}: cancelled after {took}. {_kept(job)}", icon=":material/cancel:")
    else:
        st.error(f"{title}: {markup.plain(job.message)}", icon=":material/error:")


def _kept(job: Job) -> str:
    """Say what is left of a cancelled job, and what becomes of it."""
    if not job.done or job.kind not in GROWING:
        return "Nothing was measured to its end, so nothing is kept."
    kept = f"{job.done:,} of {job.total:,} {job.what} are" if job.result else "What was measured is"
    return f"{kept} kept: start the same again, and it goes on from there."
