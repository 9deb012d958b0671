"""`make gpu-check`: what one GPU says of the library in a few minutes, as one JSON on stdout.

Needs the repository, torch, transformers, triton and pytest. Sections run one after the other, cheap and certain ones
first; none is begun when the time is up, and one that fails leaves its error and lets the others run. `--tiny` runs
every line of it on small models on a CPU; with TRITON_INTERPRET=1 in the environment the kernels, too.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from analysis.models.load import BUNDLED, LoadedModel
from analysis.recorder import capture, last_logits
from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.cache import cache_nbytes
from l2kv.decoding import decode_one_token
from l2kv.graphed import DecodingGraph
from l2kv.kernels import SWITCH
from tests.gpu import shapes
from tests.gpu.shapes import LLAMA_8B, SMOLLM2, TINY, Shape

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "triton", "numpy", "msgspec", "platformdirs")
Step = Callable[[Tensor], Tensor]
"""(token [B, 1]) -> the next token [B, 1]."""


@dataclass
class Run:
    """A run: where, for how long, and what is known so far, which is written after each figure."""

    device: torch.device
    tiny: bool
    until: float
    file: Path | None = None
    results: dict[str, Any] = field(default_factory=dict)
    bandwidth: float | None = None

    @property
    def steps(self) -> tuple[int, int, int]:
        """Number of decoding steps before any is timed, of chunks, and of steps in each, which are timed together."""
        return (1, 2, 1) if self.tiny else (4, 5, 8)

    @property
    def room(self) -> int:
        """Number of decoding steps in all."""
        before, chunks, steps = self.steps
        return before + chunks * steps

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.monotonic()

    def shape(self, shape: Shape) -> Shape:
        """A shape, or the tiny one."""
        return TINY if self.tiny else shape

    def tokens(self, n: int) -> int:
        """So many tokens, or very few."""
        return min(64, max(48, n // 512)) if self.tiny else n

    def note(self, section: str, **figures: Any) -> None:
        """Keep figures of a section, and tell of them."""
        self.results.setdefault(section, {}).update(figures)
        said = json.dumps(figures)
        print(f"  {said if len(said) < 400 else said[:400] + ' …'}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write what is known, atomically."""
        if self.file:
            half = self.file.with_suffix(".part")
            half.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
            half.replace(self.file)


Section = Callable[[Run, str], None]
"""(run, name of the section)"""


def environment(run: Run, name: str) -> None:
    """Note the machine and the versions."""

    def said_by(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"unknown: {error}"

    run.note(
        name,
        tiny=run.tiny,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine(),
        driver=said_by("nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        packages={package: _version(package) for package in PACKAGES},
        commit=said_by("git", "rev-parse", "HEAD"),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"


def bandwidth(run: Run, name: str) -> None:
    """Measure memory bandwidth, by which decoding is bounded."""
    run.bandwidth = shapes.bandwidth(run.device, 2**24 if run.tiny else 4 * 2**30)
    run.note(name, bytes_per_second=run.bandwidth, how="a copy, bytes read and written")


def tests(run: Run, name: str, *, only: str, patience: float = 150) -> None:
    """Run tests with the marker `gpu`, in a process of their own."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    places = [str(file) for file in files if (file.stem == ENGINE) == (only == ENGINE)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--durations=8"]
    try:
        out = subprocess.run([*command, *places], capture_output=True, text=True, timeout=patience, cwd=ROOT)
        said, code = out.stdout + out.stderr, out.returncode
    except subprocess.TimeoutExpired as error:
        parts = (error.stdout, error.stderr)
        said, code = "".join(p.decode() if isinstance(p, bytes) else p or "" for p in parts), None
    lines = said.strip().splitlines()
    run.note(name, exit_status=code, summary=lines[-1:], said=lines[-150:] if code else lines[-14:])


ENGINE = "test_gpu_engine"


def captures(run: Run, name: str, *, shape: Shape, n_tokens: int, torch_repeats: int = 3) -> None:
    """Measure a capture, with kernels and without, beside the plain prefill of the same model."""
    with _model(run, shape) as model:
        text = "a" + " a" * (run.tokens(n_tokens) - 2)
        loaded = LoadedModel(model, AutoTokenizer.from_pretrained(BUNDLED / "books-5m"), shape.name)
        ids = torch.tensor([loaded.tokenizer(text).input_ids], device=run.device)
        n = ids.shape[1]
        cache = shapes.kv_bytes(model.config, n, itemsize=model.dtype.itemsize)
        weights = sum(weight.nbytes for weight in model.parameters())
        run.note(name, shape=run.shape(shape).name, tokens=n, weight_bytes=weights, cache_bytes=cache)
        run.note(name, output_attentions=f"not run: its maps would take {_maps(model, n) / 1e9:.0f} GB")

        @torch.inference_mode()
        def plain() -> None:
            last_logits(model, ids, DynamicCache(config=model.config))  # type: ignore[arg-type]  # takes any

        def one(way: str, work: Callable[[], object], repeats: int) -> None:
            peak = _peak(work, run.device)  # a warm-up, too
            took = shapes.median_seconds(work, run.device, repeats=repeats, warm_up=False)
            beyond = None if peak is None else peak - cache
            run.note(name, **{way: {"seconds": took, "bytes_beyond_weights_and_cache": beyond}})

        one("plain prefill", plain, 3)
        ways = {"kernels": "triton", "torch": "torch"}
        for way, chosen in ways.items():
            with _environment(SWITCH, chosen):
                try:
                    if repeats := torch_repeats if way == "torch" else 3:
                        one(f"capture, {way}", lambda: capture(loaded, text), repeats)
                except Exception as error:
                    run.note(name, **{f"capture, {way}": {"error": _told(error)}})
                    _free()
        of = run.results[name]
        for way in ways:
            if "seconds" in of.get(f"capture, {way}", {}):
                ratio = of[f"capture, {way}"]["seconds"] / of["plain prefill"]["seconds"]
                run.note(name, **{f"capture, {way}, times the prefill": ratio})


def _maps(model: PreTrainedModel, n: int) -> int:
    return model.config.num_hidden_layers * model.config.num_attention_heads * n * n * model.dtype.itemsize


def _peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that work takes at most beyond what is there before; not measured on a CPU."""
    if device.type != "cuda":
        work()
        return None
    _free()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def decoding(run: Run, name: str, *, shape: Shape, n_tokens: int, rows: int, ways: Mapping[str, Any]) -> None:
    """Measure tokens a second over a cache of so many tokens, by several ways, each with its bound."""
    n, rows, of = run.tokens(n_tokens), min(rows, 2) if run.tiny else rows, run.shape(shape)
    if run.bandwidth is None:
        run.bandwidth = shapes.bandwidth(run.device, 2**24 if run.tiny else 4 * 2**30)
    with _model(run, shape) as model:
        weights = shapes.weight_bytes(model)
        full = shapes.kv_bytes(model.config, n, rows=rows, itemsize=model.dtype.itemsize)
        run.note(name, shape=of.name, tokens=n, rows=rows, weight_bytes=weights, full_cache_bytes=full)
        for way, begin in ways.items():
            if run.left < 5:
                run.note(name, **{way: {"error": "not begun: no time left"}})
                continue
            started = time.monotonic()
            try:
                with begin(run, model, of, n, rows) as (cache, step):
                    held = full if way.startswith("StaticCache") else cache_nbytes(cache, slack=False)
                    nbytes = cache_nbytes(cache)
                    took = _step_seconds(run, step, shapes.random_token(model, rows))
                bound = shapes.bound_seconds(weights, held, run.bandwidth)
                figures = {
                    "tokens_per_second": rows / took,
                    "milliseconds_per_step": took * 1e3,
                    "cache_bytes": nbytes,
                    "bound_tokens_per_second": rows / bound,
                    "share_of_bound": bound / took,
                }
            except Exception as error:
                figures = {"error": _told(error)}
            cache = step = None
            _free()
            run.note(name, **{way: {**figures, "section_seconds": round(time.monotonic() - started, 1)}})


def _step_seconds(run: Run, step: Step, token: Tensor) -> float:
    """Median time of a step, of several that follow each other: as in a generation, none waits for the one before."""

    def several(n: int) -> None:
        nonlocal token
        for _ in range(n):
            token = step(token)

    before, chunks, steps = run.steps
    several(before)
    return median(shapes.seconds(lambda: several(steps), run.device) / steps for _ in range(chunks))


@contextmanager
def _dynamic(run: Run, model: PreTrainedModel, shape: Shape, n: int, rows: int) -> Iterator[tuple[Cache, Step]]:
    with torch.inference_mode():
        cache = shapes.dynamic(model, n, rows)
        yield cache, lambda token: decode_one_token(model, token, cache)


@contextmanager
def _static(run: Run, model: PreTrainedModel, shape: Shape, n: int, rows: int) -> Iterator[tuple[Cache, Step]]:
    """As `generate` of transformers does it: the forward pass compiled, which takes its time at the first token."""
    torch.compiler.reset()
    options = {"backend": "eager"} if run.tiny else {"mode": "reduce-overhead"}
    compiled = torch.compile(model.__call__, **options)  # type: ignore[call-overload]

    def step(token: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    try:
        with torch.no_grad():
            cache = shapes.static(model, n, rows, room=run.room)
            yield cache, step
    finally:
        torch.compiler.reset()


@contextmanager
def _eager(
    run: Run, model: PreTrainedModel, shape: Shape, n: int, rows: int, *, keep: float, by_head: bool = False
) -> Iterator[tuple[Cache, Step]]:
    with torch.inference_mode(), compressible(model):
        cache = shapes.compressed(model, n, rows, _spec(shape, keep, by_head))
        yield cache, lambda token: decode_one_token(model, token, cache)


@contextmanager
def _graphed(
    run: Run,
    model: PreTrainedModel,
    shape: Shape,
    n: int,
    rows: int,
    *,
    keep: float,
    by_head: bool = False,
    fuse: bool = False,
) -> Iterator[tuple[Cache, Step]]:
    with torch.inference_mode():
        cache = shapes.compressed(model, n, rows, _spec(shape, keep, by_head))
        with DecodingGraph(model, cache, steps=run.room, fuse=fuse and not run.tiny) as graph:
            yield cache, graph.step


def _spec(shape: Shape, keep: float, by_head: bool) -> CompressionSpec:
    return CompressionSpec(keep_ratio=keep, head_ratios=shapes.head_plan(shape, keep) if by_head else None)


KEPT: dict[str, dict[str, Any]] = {
    "keep 1": {"keep": 1.0},
    "keep 0.5": {"keep": 0.5},
    "keep 0.1": {"keep": 0.1},
    "keep 0.5 by head": {"keep": 0.5, "by_head": True},
}
STATIC = {"StaticCache, compiled": _static}
GRAPHED = {f"{kept}, graph": partial(_graphed, **options) for kept, options in KEPT.items()}
FUSED = {f"{kept}, fused graph": partial(_graphed, **options, fuse=True) for kept, options in KEPT.items()}
EAGER = {"DynamicCache": _dynamic} | {f"{kept}, eager": partial(_eager, **options) for kept, options in KEPT.items()}


def kernels_of_a_step(run: Run, name: str, *, shape: Shape, n_tokens: int, rows: int, ways: Mapping[str, Any]) -> None:
    """Note which kernels the time of a step goes into: microseconds, and number of calls."""
    n, rows = run.tokens(n_tokens), min(rows, 2) if run.tiny else rows
    kind = torch.profiler.ProfilerActivity.CUDA if run.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    before, _, steps = run.steps
    with _model(run, shape) as model:
        for way, begin in ways.items():
            with begin(run, model, run.shape(shape), n, rows) as (_, step):
                token = shapes.random_token(model, rows)
                for _ in range(before):
                    token = step(token)
                with torch.profiler.profile(activities=[kind]) as profile:
                    for _ in range(steps):
                        token = step(token)
                    if run.device.type == "cuda":
                        torch.cuda.synchronize()
            events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
            of_step = {e.key[:90]: [round(e.self_device_time_total / steps), e.count // steps] for e in events}
            run.note(name, **{way: of_step})


def eviction(run: Run, name: str, *, shape: Shape = LLAMA_8B, n_tokens: int = 32768) -> None:
    """Note the memory allocated with a full cache, and with what is left of it after its eviction."""
    with _model(run, shape) as model, torch.inference_mode():
        before = _allocated(run.device)
        cache = shapes.dynamic(model, run.tokens(n_tokens), 1)
        full, told = _allocated(run.device) - before, cache_nbytes(cache)
        run.note(name, full={"allocated": full, "cache_nbytes": told})
        for kept in (0.5, 0.1):
            evicted = CompressedCache.from_full(cache, model.config, CompressionSpec(keep_ratio=kept))
            both = _allocated(run.device) - before
            figures = {"allocated": both - full, "cache_nbytes": evicted.nbytes, "ranks": _rank_bytes(evicted)}
            run.note(name, **{f"keep {kept}": figures})
            del evicted


def _rank_bytes(cache: CompressedCache) -> int:
    """Bytes of ranks beside the pairs: 8 per slot and kv head."""
    first = cache.compressed_layers()[0].parts()[0].keys
    return 8 * cache.nbytes // (2 * first.shape[-1] * first.itemsize)


def _allocated(device: torch.device) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU."""
    _free()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def _model(run: Run, shape: Shape) -> Iterator[PreTrainedModel]:
    """A model of a shape; freed after the block."""
    model: PreTrainedModel | None = shapes.random_model(run.shape(shape), run.device)
    try:
        yield model  # type: ignore[misc]
    finally:
        model = None
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _told(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where))
    return f"{type(error).__name__}: {str(error)[:600]} ({places})"


_SMOLLM2 = {"shape": SMOLLM2, "n_tokens": 16384, "rows": 8}
_8B_ONE = {"shape": LLAMA_8B, "n_tokens": 32768, "rows": 1}
_8B_MANY = {"shape": LLAMA_8B, "n_tokens": 32768, "rows": 8}
_PROFILED = {way: (GRAPHED | FUSED)[way] for way in ("keep 0.5, graph", "keep 0.5, fused graph")}
SECTIONS: dict[str, Section] = {
    "environment": environment,
    "bandwidth": bandwidth,
    "tests": partial(tests, only="all others"),
    "engine": partial(tests, only=ENGINE),
    "capture 8k": partial(captures, shape=LLAMA_8B, n_tokens=8192, torch_repeats=1),
    "decoding SmolLM2 16k x 8": partial(decoding, **_SMOLLM2, ways=GRAPHED | EAGER | FUSED),
    "decoding 8B 32k x 8": partial(decoding, **_8B_MANY, ways=GRAPHED | EAGER | FUSED),
    "decoding 8B 32k x 1": partial(decoding, **_8B_ONE, ways=GRAPHED | EAGER | FUSED),
    "capture 32k": partial(captures, shape=LLAMA_8B, n_tokens=32768, torch_repeats=1),
    "eviction": eviction,
    "kernels of a step, SmolLM2 16k x 8": partial(kernels_of_a_step, **_SMOLLM2, ways=_PROFILED),
    "kernels of a step, 8B 32k x 1": partial(kernels_of_a_step, **_8B_ONE, ways=_PROFILED),
    "static SmolLM2 16k x 8": partial(decoding, **_SMOLLM2, ways=STATIC),
    "static 8B 32k x 8": partial(decoding, **_8B_MANY, ways=STATIC),
    "static 8B 32k x 1": partial(decoding, **_8B_ONE, ways=STATIC),
}


def main(sections: Mapping[str, Section] = SECTIONS, *, limit: float = 240, arguments: list[str] | None = None) -> None:
    """Run the sections, and print what they found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=limit, help="no section is begun after so many seconds")
    parser.add_argument("--only", default="", help="parts of the names of sections, with commas between them")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU: is the script itself in order?")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON into this file, after each figure")
    asked = parser.parse_args(arguments)
    if not (asked.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device. --tiny tries the script on a CPU.")
    device = torch.device("cpu" if asked.tiny else "cuda:0")
    if asked.tiny:
        os.environ.setdefault(SWITCH, "triton")  # in its interpreter
        torch.set_num_threads(1)
    run = Run(device, asked.tiny, time.monotonic() + asked.seconds, asked.output)
    parts = [part.strip().lower() for part in asked.only.split(",") if part.strip()]
    for name, section in sections.items():
        if parts and not any(part in name.lower() for part in parts):
            continue
        if run.left <= 0:
            run.note(name, error="not begun: no time left")
            continue
        print(f"{name} ({run.left:.0f} s left)", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            section(run, name)
        except Exception as error:  # the others are run all the same
            traceback.print_exc()
            error_text = _told(error)
            run.note(name, error=error_text)
        _free()
        run.note(name, seconds=round(time.monotonic() - started, 1))
    print(json.dumps(run.results, indent=2))


if __name__ == "__main__":
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not there: the section tests will fail", file=sys.stderr)
    main()
