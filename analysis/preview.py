"""Generation over several caches side by side, full and compressed, token by token: of one text, or turn by turn.

All of the prompt but its last token is run and compressed; the last token is decoded over what is left. So even the
first new token comes from the compressed cache. In a chat the caches live on, and each turn runs its new tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from analysis.errors import ModelError
from analysis.evaluation.prompts import next_turn_ids, prompt_tokens
from analysis.models.load import LoadedModel
from analysis.models.memory import memory_errors
from analysis.progress import Progress, unheard
from analysis.recorder import check_length
from analysis.sampling import GREEDY, Sampling
from analysis.stories import MOST_COUNTED, Step
from analysis.texts.tokens import Tokens
from analysis.words import counted
from l2kv import CompressedCache, CompressionSpec, UnsupportedModelError, compressible
from l2kv.cache import cache_nbytes
from l2kv.config import CacheShape
from l2kv.decoding import new_cache, prefill
from l2kv.hooks import Attention, attention_hook


def stream(
    loaded: LoadedModel,
    prompt: str,
    specs: Sequence[CompressionSpec | None],
    *,
    max_new_tokens: int,
    chat: bool = False,
    sampling: Sampling = GREEDY,
    count_heads: bool = False,
    progress: Progress = unheard,
) -> Generator[tuple[Step, ...], None, None]:
    """Generate side by side, and yield the state of every column after each new token; the spec None is the full cache.

    A column that has finished repeats its last step. Close the iterator (`contextlib.closing`) to
    stop at once and restore the model: an iterator dropped midway restores it only when it is collected.

    Args:
        chat: put the prompt to the model as a user's question, by its chat template.
        sampling: how tokens are drawn.
        count_heads: count at each step the heads that hold each token of the prompt, up to `MOST_COUNTED` tokens.
        progress: counts layers while the prompt is read into one cache after the other.

    Raises:
        TextError, OutOfMemoryError: as `capture`.
        ModelError: the model cannot be compressed.
        SpecError: a spec does not fit the model.
    """
    columns = Columns(loaded, specs)
    ids = _fitting(loaded, prompt_tokens(loaded.tokenizer, prompt, chat=chat).ids, max_new_tokens)
    yield from columns.write(
        loaded, [ids] * len(specs),
        max_new_tokens=max_new_tokens, sampling=sampling, count_heads=count_heads, progress=progress,
    )  # fmt: skip


class Columns:
    """Caches side by side, full and compressed, which live on between the turns of a chat. Keeps no model.

    Each has its own text: what it read, and what was written with it.

    Args:
        specs: what to keep in each; None is the full cache.

    Raises:
        ModelError: the model cannot be compressed.
        SpecError: a spec does not fit the model.
    """

    def __init__(self, loaded: LoadedModel, specs: Sequence[CompressionSpec | None]) -> None:
        try:
            self._columns = [_Column(loaded, spec) for spec in specs]
        except UnsupportedModelError as error:
            raise ModelError(str(error)) from error

    def asked(self, loaded: LoadedModel, message: str, *, new_tokens: int) -> list[np.ndarray]:
        """Tokens [T] int64 of each column's chat, from its beginning to where a message is to be answered.

        Raises:
            TextError: the message is empty, the model has no chat template, or one that takes a single message only, or
                the chat grows longer than the model takes.
        """
        if not any(column.seen for column in self._columns):
            texts = [prompt_tokens(loaded.tokenizer, message, chat=True).ids] * len(self._columns)
        else:
            further = next_turn_ids(loaded.tokenizer, message)
            texts = [column.continued(further) for column in self._columns]
        return [_fitting(loaded, text, new_tokens) for text in texts]

    @torch.inference_mode()  # as a decorator it is on only while the generator runs, not between its steps
    def write(
        self,
        loaded: LoadedModel,
        texts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        count_heads: bool = False,
        progress: Progress = unheard,
    ) -> Generator[tuple[Step, ...], None, None]:
        """Let each column read what is new to it in its text, then all of them write in step, as `stream`."""
        with prepared(loaded):
            with watched(loaded, len(texts), progress):
                for column, text in zip(self._columns, texts, strict=True):
                    column.read(loaded, text, count_heads=count_heads)
            for _ in range(max_new_tokens):
                yield tuple(column.step(loaded, sampling) for column in self._columns)
                if all(column.finished for column in self._columns):
                    return


def tokens_per_second(
    loaded: LoadedModel, prompt: str, spec: CompressionSpec | None, *, chat: bool = False, new_tokens: int
) -> float:
    """Decode with one cache alone, and return the median rate of its tokens. Raises as `stream`."""
    times = [time.perf_counter()]
    # A text that ends at once would time nothing: what is written is no matter.
    for _ in stream(loaded, prompt, [spec], max_new_tokens=new_tokens, chat=chat):
        times.append(time.perf_counter())
    later = np.diff(times[1:] if len(times) > 2 else times)  # the first one reads the prompt
    return float(1 / np.median(later))


def _fitting(loaded: LoadedModel, ids: np.ndarray, new_tokens: int) -> np.ndarray:
    """The tokens of a text. Raises TextError if the model cannot take them and so many more."""
    check_length(loaded, Tokens(ids, np.zeros((len(ids), 2), np.int32), ()), new_tokens=new_tokens)
    return ids


class _Column:
    """A cache, and what was written with it since it read last."""

    def __init__(self, loaded: LoadedModel, spec: CompressionSpec | None) -> None:
        self._cache = new_cache(loaded.config, spec, special_ids=loaded.special_ids(spec))
        self._counted = 0  # tokens whose heads are counted
        self.seen = list[int]()  # tokens in the cache, evicted or not
        self._next, self._new = 0, list[int]()
        self._last: Step | None = None

    @property
    def finished(self) -> bool:
        return self._last is not None and self._last.finished

    def continued(self, further: np.ndarray) -> np.ndarray:
        """Tokens seen, the latest that was written, which is not in the cache yet, and `further`.

        `further` begins with the end of an answer, which may have been written already.
        """
        again = bool(self.finished and len(further) and further[0] == self._next)
        return np.concatenate([self.seen, [self._next], further[1:] if again else further]).astype(np.int64)

    def read(self, loaded: LoadedModel, text: np.ndarray, *, count_heads: bool) -> None:
        """Read a text, of which the cache may have seen the beginning, up to its last token, which comes next."""
        self._last, self._new = None, []
        self._counted = len(text) if count_heads and len(text) <= MOST_COUNTED else 0
        ids = text[len(self.seen) : -1]
        if len(ids):
            prefill(loaded.model, torch.from_numpy(ids)[None].to(loaded.device), self._cache)
        self.seen += ids.tolist()
        self._next = int(text[-1])

    def step(self, loaded: LoadedModel, sampling: Sampling) -> Step:
        if self._last is not None and self._last.finished:
            return self._last
        logits = next_logits(loaded, self._next, self._cache)
        self.seen.append(self._next)
        self._next = sampling.draw(logits, len(self._new))
        self._new.append(self._next)
        finished, nbytes = self._next in end_tokens(loaded), cache_nbytes(self._cache, slack=False)
        shown = self._new[:-1] if finished else self._new
        self._last = Step(
            token_ids=tuple(self._new),
            seen=len(self.seen),
            text=whole_characters(str(loaded.tokenizer.decode(shown, skip_special_tokens=True))),
            held=_held(self._cache),
            nbytes=nbytes,
            slack_nbytes=cache_nbytes(self._cache) - nbytes,
            finished=finished,
            kept=_kept(loaded, self._cache, self._counted) if self._counted else (),
        )
        return self._last


def next_logits(loaded: LoadedModel, token: int, cache: Cache) -> Tensor:
    """Logits [vocabulary] of what follows a token, which is added to the cache."""
    fed = torch.tensor([[token]], device=loaded.device)
    logits: Tensor = loaded.model(fed, past_key_values=cache, use_cache=True).logits
    return logits[0, -1]


@contextmanager
def prepared(loaded: LoadedModel) -> Iterator[None]:
    """Prepare the model for compressed caches within the block; failures become ModelError or OutOfMemoryError."""
    try:
        with memory_errors(), compressible(loaded.model):
            yield
    except UnsupportedModelError as error:
        raise ModelError(str(error)) from error


@contextmanager
def watched(loaded: LoadedModel, passes: int, progress: Progress) -> Iterator[None]:
    """Within the block, `progress` hears of every layer of so many forward passes."""
    done, total = 0, passes * loaded.config.num_hidden_layers

    def heard(inner: Attention, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        nonlocal done
        done += 1
        progress(min(done, total), total, "layers" if passes == 1 else f"layers of {counted(passes, 'cache')}")
        return inner(*args, **kwargs)

    with attention_hook(loaded.model, heard):
        yield


def _held(cache: Cache) -> tuple[int, ...]:
    if isinstance(cache, CompressedCache):
        return cache.held
    keys = (getattr(layer, "keys", None) for layer in cache.layers)  # a layer may carry a state, and none
    return tuple(0 if of_layer is None else of_layer.shape[-2] for of_layer in keys)


def heads_that_evict(loaded: LoadedModel) -> int:
    """Number of kv heads in the layers that may evict, of which `Step.kept` counts."""
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    return len(shape.layers) * shape.n_kv_heads


def _kept(loaded: LoadedModel, cache: Cache, n_tokens: int) -> tuple[int, ...]:
    """Number of kv heads that hold each of the first tokens."""
    if not isinstance(cache, CompressedCache):
        return (heads_that_evict(loaded),) * n_tokens
    positions = torch.cat([head[0] for layer in cache.compressed_layers() for head in layer.kept_positions()])
    return tuple(torch.bincount(positions, minlength=n_tokens)[:n_tokens].tolist())


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Ids of the tokens that end a text, by the model, its config and its tokenizer: a chat's turn may have its own."""
    named = [of.eos_token_id for of in (loaded.model.generation_config, loaded.config, loaded.tokenizer)]
    return {end for ends in named for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


def whole_characters(text: str) -> str:
    """Strip replacement characters from the end: bytes of a character that is not complete yet."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
