"""The scripts that measure on a GPU, tried on a CPU: small models, and the kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

LAYER_WEIGHTS = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64  # q, o; k, v; the MLP; norms
TINY_WEIGHTS = 4 * (2 * LAYER_WEIGHTS + 64 + 4096 * 64)  # the embedding is not read


def outcome(script, *arguments, **environment):
    out = subprocess.run(
        [sys.executable, "-m", f"tests.gpu.{script}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    return out.returncode, out.stdout, out.stderr


def measured(tmp_path, *arguments, script="check"):
    """The JSON of a run, which is both printed and written."""
    file = tmp_path / "out.json"
    code, said, told = outcome(script, "--tiny", "-o", str(file), *arguments, TRITON_INTERPRET="1", L2KV_GPU_TESTS="")
    assert code == 0, told
    assert json.loads(said) == json.loads(file.read_text())
    return json.loads(said)


def test_a_capture_is_timed_beside_the_plain_prefill(tmp_path):
    sections = measured(tmp_path, "--only", "environment,capture 8k")
    assert sections["environment"]["packages"]["torch"]
    section = sections["capture 8k"]
    assert section["cache_bytes"] == 2 * 2 * section["tokens"] * 2 * 16 * 4
    ratio = section["capture, torch"]["seconds"] / section["plain prefill"]["seconds"]
    assert section["capture, torch, times the prefill"] == pytest.approx(ratio)


def test_every_way_of_decoding_is_timed_with_its_bound(tmp_path):
    sections = measured(tmp_path, "--only", "bandwidth,decoding smollm2,static smollm2,eviction")
    bandwidth = sections["bandwidth"]["bytes_per_second"]
    ways = sections["decoding SmolLM2 16k x 8"] | sections["static SmolLM2 16k x 8"]
    assert ways["weight_bytes"] == TINY_WEIGHTS
    pairs = ways["full_cache_bytes"]
    timed = {name: way for name, way in ways.items() if isinstance(way, dict)}
    assert len(timed) == 14 and not [name for name, way in timed.items() if "error" in way]
    for name, way in timed.items():
        held = 0.5 if "0.5" in name else 0.104 if "0.1" in name else 1.0  # 5 of 48 tokens
        bound = 2 * bandwidth / (TINY_WEIGHTS + held * pairs)
        assert way["bound_tokens_per_second"] == pytest.approx(bound, rel=0.01), name
        assert way["share_of_bound"] == pytest.approx(way["tokens_per_second"] / way["bound_tokens_per_second"])
    assert sections["eviction"]["full"]["cache_nbytes"] > 1.5 * sections["eviction"]["keep 0.5"]["cache_nbytes"]


def test_a_section_that_fails_or_comes_too_late_leaves_the_others_alone(tmp_path):
    sections = measured(tmp_path, "--seconds", "0", "--only", "environment,bandwidth")
    assert {section["error"] for section in sections.values()} == {"not begun: no time left"}


def test_the_long_form_runs_too(tmp_path):
    sections = measured(tmp_path, "--only", "capture,x 2", script="bench")
    assert "seconds" in sections["capture 128k"]["capture, kernels"]
    ways = sections["decoding 8B 32k x 2"]
    assert [name for name, way in ways.items() if isinstance(way, dict) and "0.1" in name and "error" not in way]


def test_without_a_gpu_the_scripts_say_so():
    code, _, told = outcome("check", CUDA_VISIBLE_DEVICES="")
    assert code == 2 and "no CUDA device" in told
