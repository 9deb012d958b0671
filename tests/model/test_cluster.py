"""Evaluations on a Ray cluster of two workers: the same table as in one process, whoever is lost on the way."""

import os
import signal
from functools import partial

import numpy as np
import pytest
import ray

from analysis.__main__ import main
from analysis.errors import ModelError, OutOfMemoryError
from analysis.evaluation.cluster import ray_workers
from analysis.evaluation.run import evaluate
from analysis.evaluation.task import Sample, Scoring, Task
from analysis.evaluation.tasks import TASKS
from analysis.models.load import load_model, outline
from l2kv import CompressionSpec
from tests.support.model_folders import rewrite_weights
from tests.support.policies import forget_files

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all
METHODS = {
    "full cache": None,
    "half": CompressionSpec(keep_ratio=0.5),
    "keydiff": CompressionSpec(keep_ratio=0.5, policy="keydiff"),
    "two": CompressionSpec(budget=2),
}


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    """A cluster of two cores."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(two_cores, whole_folder):
    """Two copies of a tiny model."""
    with ray_workers(str(whole_folder), workers=2) as both:
        yield both


def samples(loaded, settings, texts, *, n, ends):
    """`n` samples of random tokens, no neighbours of one length: each is a pass of its own."""
    draw = np.random.default_rng(0)
    contexts = [draw.integers(2, 4000, size=8 + i % 3) for i in range(n)]
    return [Sample(f"{i}", ids[:-1], ids[-1:], new_tokens=2, example=ends) for i, ids in enumerate(contexts)]


def length_of_answer(sample, text):
    """Score an answer; a process that scores the sample 5 is ended, as often as there are files for it."""
    for file in sorted(sample.example.glob("*")) if sample.name == "5" else ():
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(text))


@pytest.fixture
def ends(tmp_path):
    """A folder with a file for each process to be ended."""
    (tmp_path / "ends").mkdir()
    return tmp_path / "ends"


@pytest.fixture
def toy(monkeypatch, ends, whole_folder):
    """(number of samples, file, workers) -> the results of a task of its own, here or on workers"""

    def evaluated(n, out, workers=None):
        settled = {"build": partial(samples, n=n, ends=ends), "scoring": Scoring(length_of_answer)}
        monkeypatch.setitem(TASKS._entries, "toy", Task("Toy", "Lengths of answers.", "characters", True, **settled))
        loaded = load_model(whole_folder, device="cpu") if workers is None else outline(whole_folder)
        return evaluate(loaded, "toy", METHODS, out=out, workers=workers)

    return evaluated


def test_the_command_makes_the_same_table_as_in_one_process(whole_folder, tmp_path, capsys):
    command = f"evaluate lm -m {whole_folder} --device cpu --prompt-tokens 24 --new-tokens 4 --keep-ratios 0.5 --json"
    assert main([*command.split(), "-o", str(tmp_path / "here.jsonl")]) == 0
    here = capsys.readouterr().out
    assert main([*command.split(), "-o", str(tmp_path / "ray.jsonl"), "--ray", "auto", "--workers", "2"]) == 0
    assert capsys.readouterr().out == here
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


def test_a_policy_of_the_users_own_goes_to_the_workers_with_its_file(whole_folder, tmp_path, capsys):
    file = tmp_path / "oldest.py"
    file.write_text("def score(keys, values, positions):\n    return -positions\n")
    command = f"evaluate lm -m {whole_folder} --device cpu --prompt-tokens 24 --new-tokens 4 --keep-ratios 0.5 --json"
    command += f" --protect-last 0 --policies low_norm,{file}:score"
    with forget_files():
        assert main([*command.split(), "--ray", "auto", "--workers", "1"]) == 0
        far = capsys.readouterr().out
        assert main(command.split()) == 0
    assert far == capsys.readouterr().out and "oldest.py:score@" in far


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("-m nowhere/at/all --ray auto", "No such model: 'nowhere/at/all'"),
        ("--ray 127.0.0.1:9", "There is no Ray cluster at '127.0.0.1:9'"),
        ("--ray auto --workers 3", "The number of workers must be 1 to 2, as the cluster's CPUs are, got 3"),
        ("--workers 2", "without --ray there is one copy of the model: leave out --workers"),
    ],
)
def test_a_mistake_is_told_in_one_line(options, told, capsys, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: "auto" in options)  # else an address would not be looked at
    assert main(f"evaluate lm -m books-5m {options}".split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error


def test_what_is_wrong_with_a_model_on_a_worker_reaches_the_driver(folder):
    rewrite_weights(folder, model__norm__weight=None)
    with pytest.raises(ModelError, match="is incomplete: 1 weights are missing"), ray_workers(str(folder), workers=1):
        pass


def test_a_thousand_cells_are_those_of_one_process(toy, workers, tmp_path):
    far = toy(250, tmp_path / "far.jsonl", workers)
    assert len(far.rows) == 1000 and len({row.score for row in far.rows}) > 5
    assert far == toy(250, tmp_path / "here.jsonl")
    assert (tmp_path / "far.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


def test_what_a_lost_worker_had_to_do_is_done_again(toy, workers, ends, tmp_path):
    (ends / "1").touch()
    far = toy(12, tmp_path / "far.jsonl", workers)
    assert not [*ends.glob("*")], "no worker was lost"
    assert far == toy(12, tmp_path / "here.jsonl")
    assert (tmp_path / "far.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes(), "once each, in order"


def test_a_stopped_run_is_continued_on_the_cluster(toy, workers, ends, tmp_path):
    whole, part = toy(12, tmp_path / "whole.jsonl"), tmp_path / "part.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:21]))
    assert toy(12, part, workers) == whole
    assert part.read_text() == "".join(lines)


def test_batches_that_workers_are_lost_at_time_and_again_are_given_up(toy, workers, ends):
    for number in range(9):
        (ends / f"{number}").touch()
    with pytest.raises(OutOfMemoryError, match="3 workers were lost at the sample '5'"):
        toy(12, None, workers)
    assert len([*ends.glob("*")]) == 6
