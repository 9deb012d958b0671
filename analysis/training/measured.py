"""What there is to say of a model in numbers, for its card: prediction, retrieval, heads, samples. Writes no file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from analysis.capturing import capture
from analysis.errors import TextError
from analysis.evaluation import (
    NllChange,
    PasskeyScore,
    Specs,
    bits_per_byte,
    nll_changes,
    passkey_grid,
    passkeys,
    policy_specs,
)
from analysis.generation import stream
from analysis.measures import correlation, verdicts
from analysis.models import LoadedModel
from analysis.plans.skip import suggest_skip_layers
from analysis.tokens import passages, tokenize
from l2kv import CompressionSpec

FULL = "full cache"
PLAN = "plan"
"""Begins the names of plans: low norm, with the layers left whole that the capture of a text suggests."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. What is longer than the model's positions is left out."""

    windows: tuple[int, ...] = (512,)
    """Tokens of context, the special first one included, beside all the positions of the model."""
    lengths: tuple[int, ...] = (250, 500, 750, 1000)
    """Tokens of the passkey prompts, at most."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    keys: int = 3
    keep_ratios: tuple[float, ...] = (0.5, 0.1)
    protect_last: tuple[int, ...] = (0, 32)
    chunks: int = 12
    """Captured for the heads, shared out evenly among the texts, and spread evenly over each."""
    chunk_tokens: int = 480
    nll_texts: int = 8
    """Of the chunks, that the change of NLL is measured on."""
    prompt_tokens: int = 256
    new_tokens: int = 100
    sample_tokens: int = 60
    prompts: tuple[str, ...] = ("The old man looked at the sea, and", "When the letter came, she read it twice, and")


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits per byte on a text."""

    text: str  # its name
    n_bytes: int
    context: int  # tokens a window, the special first one included
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Heads:
    """Γ of all heads over several chunks of text. [L, H] each; None: undefined in every chunk."""

    chunks: int
    chunk_tokens: int  # at least
    gamma: list[list[float | None]]  # mean over the chunks
    gamma_without_first: list[list[float | None]]
    below_zero: list[list[int]]  # chunks in which Γ is below 0
    above_zero: list[list[int]]
    verdict: list[list[str]]  # the one that most chunks give
    verdict_chunks: list[list[int]]  # how many give it

    @property
    def total(self) -> int:
        return sum(len(row) for row in self.gamma)

    @property
    def mean_below_zero(self) -> int:
        """Heads whose mean Γ is below 0."""
        return sum(gamma is not None and gamma < 0 for row in self.gamma for gamma in row)

    @property
    def steady(self) -> int:
        """Heads whose Γ has the same sign in every chunk."""
        counts = [c for row in (*self.below_zero, *self.above_zero) for c in row]
        return sum(count == self.chunks for count in counts)


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy continuation over the full cache."""

    prompt: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Measured:
    """All of it."""

    device: str
    dtype: str
    torch: str
    transformers: str
    bits: tuple[Bits, ...]
    passkey: tuple[PasskeyScore, ...]  # empty: no prompt fits the model's positions
    nll: tuple[NllChange, ...]  # empty: the chunks are too short
    nll_prompt_tokens: int
    nll_new_tokens: int
    specs: Specs
    heads: Heads
    samples: tuple[Sample, ...]


OnStage = Callable[[str, int, int], None]
"""Called as (what is being measured, done, total). What it raises cancels it all and passes through."""


def measure(
    loaded: LoadedModel,
    texts: Mapping[str, str],
    *,
    effort: Effort | None = None,
    plans: Specs | None = None,
    on_stage: OnStage = lambda stage, done, total: None,
) -> Measured:
    """Measure a model on texts.

    Args:
        texts: by name; each of at least one chunk of whole sentences.
        effort: other than usual.
        plans: specs to compare beside the policies and the suggested skip plan, by name.

    Raises:
        TextError: a text is empty, or all are too short.
        ModelError, OutOfMemoryError: as `capture`.
    """
    effort = effort or Effort()
    chunks = _chunks(loaded, texts, effort)
    runs = []
    for i, chunk in enumerate(chunks):
        runs.append(capture(loaded, chunk))
        on_stage("heads", i + 1, len(chunks))
    specs = {FULL: None} | _policies(effort) | _skip_plans(runs[0], effort) | dict(plans or {})
    compressed = {name: spec for name, spec in specs.items() if spec is not None}
    unseen = chunks[1:] or chunks  # the plan is made on the first
    long_enough = [
        chunk for chunk in unseen if len(tokenize(loaded.tokenizer, chunk)) >= effort.prompt_tokens + effort.new_tokens
    ]
    return Measured(
        device=_device_name(loaded),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        torch=torch.__version__,
        transformers=transformers.__version__,
        bits=_bits(loaded, texts, effort, on_stage),
        passkey=_passkey(loaded, specs, effort, on_stage),
        nll=nll_changes(
            loaded,
            _spread(long_enough, effort.nll_texts),
            compressed if long_enough else {},
            prompt_tokens=effort.prompt_tokens,
            new_tokens=effort.new_tokens,
            on_done=lambda done, total: on_stage("NLL", done, total),
        ),
        nll_prompt_tokens=effort.prompt_tokens,
        nll_new_tokens=effort.new_tokens,
        specs=specs,
        heads=_heads(runs, effort),
        samples=tuple(_sample(loaded, prompt, effort.sample_tokens) for prompt in effort.prompts),
    )


def _chunks(loaded: LoadedModel, texts: Mapping[str, str], effort: Effort) -> list[str]:
    """Chunks of whole sentences, as many of each text as it has and its share is."""
    longest = loaded.config.max_position_embeddings - 1  # the probe is one more
    chunks = [
        chunk
        for text in texts.values()
        for chunk in _spread(
            [
                passage.prompt
                for passage in passages(
                    loaded.tokenizer,
                    text,
                    at_least=effort.chunk_tokens,
                    at_most=min(longest, effort.chunk_tokens + 100),
                )
            ],
            max(1, effort.chunks // len(texts)),
        )
    ]
    if not chunks:
        raise TextError(
            f"The texts ({', '.join(texts)}) hold no chunk of whole sentences of {effort.chunk_tokens} to "
            f"{min(longest, effort.chunk_tokens + 100)} tokens. Give longer ones."
        )
    return chunks


def _spread(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items, evenly spread; all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _policies(effort: Effort) -> dict[str, CompressionSpec]:
    return {
        f"{name}, last {last} protected": spec
        for last in effort.protect_last
        for name, spec in policy_specs(effort.keep_ratios, protect_last=last).items()
    }


def _skip_plans(run, effort: Effort) -> dict[str, CompressionSpec]:
    layers = suggest_skip_layers(run).layers
    whole = f"layers {', '.join(map(str, layers))} whole" if layers else "no layer whole"
    if len(layers) == run.n_layers:
        whole = "every layer whole: nothing is evicted"
    last = max(effort.protect_last)
    return {
        f"{PLAN}: keep {ratio:g}, low norm, last {last} protected, {whole}": CompressionSpec(
            keep_ratio=ratio, protect_last=last, skip_layers=layers
        )
        for ratio in effort.keep_ratios
    }


def _bits(loaded: LoadedModel, texts: Mapping[str, str], effort: Effort, on_stage: OnStage) -> tuple[Bits, ...]:
    positions = loaded.config.max_position_embeddings
    windows = sorted({*(w for w in effort.windows if w <= positions), positions})
    results = []
    for name, text in texts.items():
        for window in windows:
            value = bits_per_byte(loaded, text, context=window)
            results.append(Bits(name, len(text.encode("utf-8")), window, round(value, 4)))
            on_stage("bits per byte", len(results), len(windows) * len(texts))
    return tuple(results)


def _passkey(loaded: LoadedModel, specs: Specs, effort: Effort, on_stage: OnStage) -> tuple[PasskeyScore, ...]:
    room = 12  # for the answer
    return passkey_grid(
        loaded,
        specs,
        lengths=[n for n in effort.lengths if n + room <= loaded.config.max_position_embeddings],
        depths=effort.depths,
        keys=passkeys(effort.keys),
        on_done=lambda done, total: on_stage("passkey", done, total),
    )


def _heads(runs, effort: Effort) -> Heads:
    gamma = np.array([correlation(run) for run in runs])  # [chunks, L, H]
    verdict = np.array([verdicts(run) for run in runs])
    common = [
        [Counter(verdict[:, layer, head]).most_common(1)[0] for head in range(gamma.shape[2])]
        for layer in range(gamma.shape[1])
    ]
    return Heads(
        chunks=len(runs),
        chunk_tokens=effort.chunk_tokens,
        gamma=_mean(gamma),
        gamma_without_first=_mean(np.array([correlation(run, leave_out=1) for run in runs])),
        below_zero=(gamma < 0).sum(axis=0).tolist(),
        above_zero=(gamma > 0).sum(axis=0).tolist(),
        verdict=[[name for name, _ in row] for row in common],
        verdict_chunks=[[count for _, count in row] for row in common],
    )


def _mean(figures: np.ndarray) -> list[list[float | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a head that is undefined in all chunks: None, below
        mean = np.nanmean(figures, axis=0)
    return [[None if np.isnan(x) else round(float(x), 3) for x in row] for row in mean]


def _sample(loaded: LoadedModel, prompt: str, n: int) -> Sample:
    text = ""
    with closing(stream(loaded, prompt, [None], max_new_tokens=n)) as steps:
        for (step,) in steps:
            text = step.text
    return Sample(prompt, text)


def _device_name(loaded: LoadedModel) -> str:
    if loaded.device.type == "cuda":
        return torch.cuda.get_device_name(loaded.device)
    return "CPU"
