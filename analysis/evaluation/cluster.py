"""Evaluations on a Ray cluster: a worker for each copy of the model. Needs the extra `ray`.

A worker does to its batches what a run in one process does. Here they are handed out, rows are passed on in the order
of such a run, and what a lost worker had to do is done again by another. Knows no task.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from analysis.errors import OutOfMemoryError, SettingsError, UserError
from analysis.evaluation.batches import Cells
from analysis.evaluation.results import Row
from analysis.evaluation.run import Machine, run_cells
from analysis.evaluation.task import Scoring
from analysis.models.load import load_model
from analysis.preview import prepared
from l2kv.errors import SpecError
from l2kv.policies import OF_FILE
from l2kv.policy_files import policy_source, reload_policy

_TRIES = 3  # of anything that workers are lost at


@contextmanager
def ray_workers(
    model: str, *, address: str = "auto", workers: int | None = None, device: str | None = None
) -> Iterator[RayWorkers]:
    """Start workers on a Ray cluster, for `evaluate(..., workers=...)` within the block.

    Args:
        model: name, folder, GGUF file or hub id of a model, which each worker loads for itself.
        address: HOST:PORT of a cluster, or "auto": the one that `RAY_ADDRESS` names, or else a new one on this machine
            for as long as the block lasts.
        workers: number of copies of the model; by default one for each GPU or, where there are none, for each machine.
            On a CPU they share the cores evenly.
        device: as for `load_model`.

    Where Ray has been initialised already, that cluster is used.

    Raises:
        SettingsError: there is no such cluster, it has no room for so many workers, or they differ.
        ModelError, OutOfMemoryError: as `load_model`, on a worker.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(address)
    try:
        n, resources = _places(workers, device)
        yield RayWorkers(partial(_Worker.options(**resources).remote, model, device), n)  # type: ignore[attr-defined]
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a worker was asked: to run batches, or at first to load its model."""

    batches: Sequence[Cells] | None = None
    place: int = 0
    """Place of the batches among all."""
    worker: Any = None
    tries: int = 1


class RayWorkers:
    """The `Workers` of a Ray cluster. Each joins once it has loaded its model; lost ones are replaced.

    Args:
        new: starts a worker.
        n: number of workers.
    """

    def __init__(self, new: Callable[[], Any], n: int) -> None:
        self._new = new
        self._idle: list[Any] = []
        self._asked: dict[Any, _Asked] = {}
        self._machine: Machine | None = None
        for _ in range(n):
            self._start(_Asked())
        while self._machine is None:
            list(self._answers())

    @property
    def machine(self) -> Machine:
        """What each worker computes with."""
        assert self._machine is not None
        return self._machine

    def run(
        self, passes: Sequence[Sequence[Cells]], scoring: Scoring | None, tick: Callable[[], object]
    ) -> Generator[tuple[Cells, Sequence[Row]], None, None]:
        """Run batches, those of a pass on one worker; `tick` is called every second.

        Raises:
            OutOfMemoryError: workers are lost at the same batches again and again.
        """
        todo = deque(_Asked(batches, place) for place, batches in enumerate(passes))
        done: dict[int, list[tuple[Cells, list[Row]]]] = {}
        for place in range(len(passes)):
            while place not in done:
                while todo and self._idle:
                    asked = replace(todo.popleft(), worker=self._idle.pop())
                    assert asked.batches is not None
                    run = asked.worker.run.remote(asked.batches, scoring, _own_policies(asked.batches))
                    self._asked[run] = asked
                tick()
                for asked, rows in self._answers():
                    if rows is None:
                        todo.appendleft(replace(asked, tries=asked.tries + 1))
                    else:
                        done[asked.place] = rows
            yield from done.pop(place)

    def _start(self, asked: _Asked) -> None:
        worker = self._new()
        self._asked[worker.machine.remote()] = replace(asked, worker=worker)

    def _answers(self) -> Iterator[tuple[_Asked, list[tuple[Cells, list[Row]]] | None]]:
        """Wait a second at most, and yield what was run, with its rows, or with None where its worker was lost."""
        answered, _ = ray.wait([*self._asked], timeout=1.0)
        for reference in answered:
            asked = self._asked.pop(reference)
            try:
                answer = ray.get(reference)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError | SpecError) else error from None
            except RayError as error:  # of the worker, not of what it ran
                if asked.tries == _TRIES:
                    raise OutOfMemoryError(_lost(asked, error)) from error
                answer = None
            if asked.batches is not None:
                if answer is None:
                    self._start(_Asked())
                else:
                    self._idle.append(asked.worker)
                yield asked, answer
            elif answer is None:
                self._start(replace(asked, tries=asked.tries + 1))
            else:
                self._machine = _same(self._machine or answer, answer)
                self._idle.append(asked.worker)


@ray.remote
class _Worker:
    """A copy of a model, loaded when it is first asked for, so that the driver hears what is wrong with it."""

    def __init__(self, model: str, device: str | None) -> None:
        self._loaded = cache(partial(load_model, model, device=device))

    def machine(self) -> Machine:
        """What it computes with."""
        return Machine.of(self._loaded())

    @torch.inference_mode()
    def run(
        self, batches: Sequence[Cells], scoring: Scoring | None, policies: Mapping[str, bytes]
    ) -> list[tuple[Cells, list[Row]]]:
        """Run batches of one pass; `policies` are those of files, by name."""
        for name, source in policies.items():
            reload_policy(name, source)
        with prepared(self._loaded()):
            return list(run_cells(self._loaded(), batches, scoring))


def _own_policies(batches: Sequence[Cells]) -> dict[str, bytes]:
    """Files of the policies of batches that are of files, by name. Raises SpecError where one is not loaded here."""
    names = {spec.policy for cells in batches for spec in cells.specs if spec}
    return {name: policy_source(name)[2] for name in names if OF_FILE.fullmatch(name)}


def _connect(address: str) -> None:
    """Connect to a cluster, or start one. Raises SettingsError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent to Ray's makers
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    if address == "local":
        ray.init("local", include_dashboard=False, **quiet)
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
    except (OSError, ValueError, OverflowError) as error:
        raise SettingsError(
            f"There is no Ray cluster at {address!r:.100} ({error}). Give the HOST:PORT that `ray start --head` told, "
            "or auto for one on this machine."
        ) from error
    ray.init(address, **quiet)


def _places(workers: int | None, device: str | None) -> tuple[int, dict[str, int]]:
    """Number of workers, and the GPUs or cores that each takes. Raises SettingsError if the cluster has too few."""
    kind = "CPU" if device == "cpu" or not ray.cluster_resources().get("GPU") else "GPU"
    nodes = [n for node in ray.nodes() if node["Alive"] and (n := int(node["Resources"].get(kind, 0)))]
    n = (sum(nodes) if kind == "GPU" else len(nodes)) if workers is None else workers
    each = max((k for k in range(1, max(nodes, default=0) + 1) if sum(of // k for of in nodes) >= n), default=0)
    if n < 1 or not each:
        raise SettingsError(f"The number of workers must be 1 to {sum(nodes)}, as the cluster's {kind}s are, got {n}.")
    return n, {"num_gpus": 1} if kind == "GPU" else {"num_cpus": each}


def _same(known: Machine, joins: Machine) -> Machine:
    """The machine that both are. Raises SettingsError: which rows come from which would be chance."""
    then, now = asdict(known), asdict(joins)
    if told := [f"{name} {then[name]} and {now[name]}" for name in then if then[name] != now[name]]:
        raise SettingsError(f"The workers differ, and so would their results: {'; '.join(told):.300}.")
    return joins


def _lost(asked: _Asked, error: RayError) -> str:
    what = "loading the model" if asked.batches is None else f"the sample {asked.batches[0].samples[0].name!r:.60}"
    why = str(error).partition("\n")[0]
    return f"{_TRIES} workers were lost at {what}, perhaps for want of memory ({why:.200}). Use fewer on a machine."
