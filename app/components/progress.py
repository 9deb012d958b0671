"""A job on a page: what it is doing, how long it will still take, and its Cancel button."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from analysis.words import duration
from app import state
from app.components import markup
from app.jobs import Job, Jobs

_EVERY = 0.5  # seconds between two looks at a job


def told(job: Job) -> str:
    """Say how far a job is: "3 of 24 texts, about 2 min left"."""
    if not job.total:
        return job.stage
    left = job.seconds_left
    return f"{job.done:,} of {job.total:,} {job.what}" + (f", about {duration(left)} left" if left is not None else "")


def current(jobs: Jobs, *, on_done: Callable[[Job], object]) -> Job | None:
    """Find the job that the address names; once it has ended the address forgets it. Call it before a page is drawn.

    Args:
        on_done: called once after it is done.
    """
    job = jobs.find(state.JOB.get())
    if job is None:
        if state.JOB.get():
            state.notice("The job that the address names is gone: the server was restarted. What it measured is kept.")
        state.JOB.drop()
    elif not job.running:
        state.JOB.drop()
        if job.status == "done":
            on_done(job)
    return job


def draw(job: Job) -> None:
    """Draw how far a job is, or once, how it ended."""
    if job.running:
        _running(job)
    else:
        _end(job)


@st.fragment(run_every=_EVERY)
def _running(job: Job) -> None:
    if not job.running:
        st.rerun()
    with st.container(border=True, key="job", horizontal=True, vertical_alignment="center"):
        share = min(job.done / job.total, 1.0) if job.total else 0.0
        st.progress(share, f"{markup.plain(job.title)}: {markup.plain(told(job))}")
        st.button("Cancel", icon=":material/cancel:", key="job_cancel", on_click=job.cancel)


def _end(job: Job) -> None:
    title, took = markup.plain(job.title), duration(job.seconds)
    if job.status == "done":
        st.toast(f"{title}: done in {took}.", icon=":material/check:")
    elif job.status == "cancelled":
        st.info(f"{title}: cancelled after {took}. What was measured is kept.", icon=":material/cancel:")
    else:
        st.error(f"{title}: {markup.plain(job.message)}", icon=":material/error:")
