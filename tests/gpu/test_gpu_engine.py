"""The app's own engine on a GPU, without its pages: load, capture, generate, cancel, run out of memory, and go on."""

import shutil
import time

import numpy as np
import pytest
import torch

from analysis.errors import OutOfMemoryError
from analysis.preview import stream
from analysis.recorder import capture
from app.engine import Engine
from app.jobs import Jobs
from l2kv import CompressionSpec
from tests.support.models import build
from tests.support.paths import BUNDLED
from tests.support.texts import TEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a tiny model that loads, with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    build("llama", vocab_size=4096, head_dim=16, max_position_embeddings=2**17).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, folder)
    return str(folder)


@pytest.fixture
def engine():
    return Engine(any_folder=True)


def ignore(*_):
    pass


def captured(engine, folder, text=TEXT):
    with engine.lend(folder, ignore) as loaded:
        return capture(loaded, text)


def ended(job):
    deadline = time.monotonic() + 60
    while job.running and time.monotonic() < deadline:
        time.sleep(0.01)
    return job.status


def test_a_capture_is_made_on_the_device_and_holds_probabilities(engine, folder, device):
    run = captured(engine, folder)
    assert run.device.startswith(device.type)
    assert run.dtype == ("float32" if device.type == "cpu" else "bfloat16")
    assert np.isfinite(run.key_norm).all() and (run.key_norm > 0).all()
    # Each query spreads 1 over the keys that it sees; the mean over queries that see a key, times their number: T.
    given = (run.attention_received * np.arange(run.n_tokens, 0, -1)).sum(-1)
    np.testing.assert_allclose(given, run.n_tokens, rtol=0.02)


def test_a_capture_on_the_device_agrees_with_one_on_the_cpu(engine, folder, cuda, monkeypatch):
    from analysis.models.load import load_model

    ours = capture(load_model(folder, device="cuda", dtype=torch.float32), TEXT)
    theirs = capture(load_model(folder, device="cpu"), TEXT)
    for name in ("key_norm", "value_norm", "attention_received", "probe_attention", "recent_attention"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=2e-3, err_msg=name)


def test_a_preview_generates_over_a_full_and_a_compressed_cache(engine, folder):
    with engine.lend(folder, ignore) as loaded:
        columns = [None, CompressionSpec(keep_ratio=0.5), CompressionSpec(head_ratios={(0, 0): 0.2})]
        steps = list(stream(loaded, TEXT, columns, max_new_tokens=8))
    full, half, by_head = steps[-1]
    assert full.held[0] == full.seen and half.held[0] == -(-half.seen // 2)
    assert by_head.nbytes < half.nbytes < full.nbytes
    assert len(full.token_ids) >= 1


def test_a_cancelled_job_frees_the_engine_for_the_next(engine, folder):
    jobs = Jobs(engine)

    def work(loaded, progress):
        job.cancel()
        capture(loaded, TEXT, progress=progress)
        return "never"

    job = jobs.start("Capturing", folder, work, kind="run")
    assert ended(job) == "cancelled" and not job.result
    assert engine.waiting == 0
    assert captured(engine, folder).n_tokens > 0


def test_out_of_memory_is_told_as_such_and_the_next_capture_works(engine, folder, cuda):
    captured(engine, folder)  # loads the model, and warms up
    long = TEXT * 600  # the estimate goes by the whole card, the allocator by the part that is left to it here
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
        with pytest.raises(OutOfMemoryError, match="Memory ran out"):
            captured(engine, folder, long)
        job = Jobs(engine).start("Capturing", folder, lambda loaded, tell: str(capture(loaded, long)), kind="run")
        assert ended(job) == "failed" and job.message.startswith("Memory ran out")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert captured(engine, folder).n_tokens > 0
