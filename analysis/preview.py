"""Greedy generation over several caches side by side, full and compressed, token by token.

All of the prompt but its last token is run and compressed; the last token is decoded over what is left. So even the
first new token comes from the compressed cache.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from analysis.errors import ModelError
from analysis.evaluation.prompts import prompt_tokens
from analysis.models.load import LoadedModel
from analysis.models.memory import memory_errors
from analysis.progress import Progress, unheard
from analysis.recorder import check_length
from analysis.texts.tokens import Tokens
from l2kv import CompressedCache, CompressionSpec, UnsupportedModelError, compressible
from l2kv.cache import cache_nbytes
from l2kv.decoding import decode_one_token, new_cache, prefill
from l2kv.hooks import Attention, attention_hook


@dataclass(frozen=True, slots=True)
class Step:
    """A new token, and the state of the cache after it."""

    token_ids: tuple[int, ...]  # of all new tokens
    text: str  # all new tokens, without special ones such as the end token
    held: tuple[int, ...]  # tokens in the cache, per layer
    nbytes: int  # bytes of the keys and values of those tokens
    slack_nbytes: int  # bytes of storage reserved for more
    finished: bool  # the model ended its text here


@torch.inference_mode()  # as a decorator it is on only while the generator runs, not between its steps
def stream(
    loaded: LoadedModel,
    prompt: str,
    specs: Sequence[CompressionSpec | None],
    *,
    max_new_tokens: int,
    chat: bool = False,
    progress: Progress = unheard,
) -> Generator[tuple[Step, ...], None, None]:
    """Generate side by side, and yield the state of every column after each new token; the spec None is the full cache.

    A column that has finished repeats its last step. Close the iterator (`contextlib.closing`) to
    stop at once and restore the model: an iterator dropped midway restores it only when it is collected.

    Args:
        chat: put the prompt to the model as a user's question, by its chat template.
        progress: counts layers while the prompt is read into one cache after the other.

    Raises:
        TextError, OutOfMemoryError: as `capture`.
        ModelError: the model cannot be compressed.
        ValueError: a spec does not fit the model.
    """
    tokens = prompt_tokens(loaded.tokenizer, prompt, chat=chat)
    check_length(loaded, tokens, new_tokens=max_new_tokens)
    with prepared(loaded):
        with _watched(loaded, len(specs), progress):
            columns = [_Column(loaded, tokens, spec) for spec in specs]
        for _ in range(max_new_tokens):
            yield tuple(column.step() for column in columns)
            if all(column.finished for column in columns):
                return


class _Column:
    def __init__(self, loaded: LoadedModel, tokens: Tokens, spec: CompressionSpec | None) -> None:
        self._loaded = loaded
        self._cache = new_cache(loaded.config, spec, special_ids=loaded.special_ids(spec))
        ids = torch.from_numpy(tokens.ids)[None].to(loaded.device)
        prefill(loaded.model, ids[:, :-1], self._cache)
        self._next, self._new = ids[:, -1:], list[int]()
        self._last: Step | None = None
        self._ends = end_tokens(loaded)

    @property
    def finished(self) -> bool:
        return self._last is not None and self._last.finished

    def step(self) -> Step:
        if self._last is not None and self._last.finished:
            return self._last
        self._next = decode_one_token(self._loaded.model, self._next, self._cache)
        self._new.append(int(self._next))
        finished, nbytes = self._new[-1] in self._ends, cache_nbytes(self._cache, slack=False)
        shown = self._new[:-1] if finished else self._new
        self._last = Step(
            token_ids=tuple(self._new),
            text=whole_characters(str(self._loaded.tokenizer.decode(shown, skip_special_tokens=True))),
            held=_held(self._cache),
            nbytes=nbytes,
            slack_nbytes=cache_nbytes(self._cache) - nbytes,
            finished=finished,
        )
        return self._last


@contextmanager
def prepared(loaded: LoadedModel) -> Iterator[None]:
    """Prepare the model for compressed caches within the block; failures become ModelError or OutOfMemoryError."""
    try:
        with memory_errors(), compressible(loaded.model):
            yield
    except UnsupportedModelError as error:
        raise ModelError(str(error)) from error


@contextmanager
def _watched(loaded: LoadedModel, passes: int, progress: Progress) -> Iterator[None]:
    """Within the block, `progress` hears of every layer of so many forward passes."""
    done, total = 0, passes * loaded.config.num_hidden_layers

    def heard(inner: Attention, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        nonlocal done
        done += 1
        progress(min(done, total), total, "layers")
        return inner(*args, **kwargs)

    with attention_hook(loaded.model, heard):
        yield


def _held(cache: Cache) -> tuple[int, ...]:
    if isinstance(cache, CompressedCache):
        return cache.held
    keys = (getattr(layer, "keys", None) for layer in cache.layers)  # a layer may carry a state, and none
    return tuple(0 if of_layer is None else of_layer.shape[-2] for of_layer in keys)


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Ids of the tokens that end a text, by the model, its config and its tokenizer: a chat's turn may have its own."""
    named = [of.eos_token_id for of in (loaded.model.generation_config, loaded.config, loaded.tokenizer)]
    return {end for ends in named for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


def whole_characters(text: str) -> str:
    """Strip replacement characters from the end: bytes of a character that is not complete yet."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
