"""Capture of a text: key norms and attention of every head from one run of a model, without a T x T matrix.

The model runs as usual, through its own attention. Beside each layer's attention the probabilities are recomputed in
blocks of queries, summed up and dropped: memory grows with T, not with T^2.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from analysis.captures import Capture
from analysis.errors import ModelError, OutOfMemoryError, SettingsError, TextError
from analysis.models.load import LoadedModel
from analysis.models.memory import (
    BLOCK,
    LAST_QUERIES,
    MAX_BINS,
    RECENT_BYTES,
    capture_bytes,
    memory_errors,
    usable_bytes,
)
from analysis.progress import Progress, unheard
from analysis.texts.tokens import LONG, MIN_TOKENS, Tokens, about_tokens, tokenize
from analysis.words import counted, human_bytes
from l2kv import UnsupportedModelError, kernels
from l2kv.config import CacheShape, layer_kinds
from l2kv.hooks import Look, WatchedCache, watching
from l2kv.probabilities import attention_probabilities, hide_unseen


def capture(
    loaded: LoadedModel,
    text: str,
    *,
    last_queries: int = LAST_QUERIES,
    look: Callable[[Look], object] = lambda at: None,
    progress: Progress = unheard,
) -> Capture:
    """Capture a text: run the model over it, then over its greedy next token, and record what each head did.

    Args:
        loaded: the model.
        text: text of at least a few tokens.
        last_queries: number of last queries whose rows are kept one by one. Fewer are kept of a shorter text, and where
            they would take more than 256 MiB.
        look: called with the queries, keys and values of each layer, while the model runs over the text.
        progress: counts layers; called after each, and before each block of queries in it.

    Raises:
        TextError: the text is empty, too short, or longer than the model's learned positions.
        SettingsError: `last_queries` is below 0.
        OutOfMemoryError: the capture would not fit into free memory; the message says what would.
        ModelError: the weights give NaN, or the architecture's attention cannot be captured.
    """
    if last_queries < 0:
        raise SettingsError(f"last_queries must be 0 or more, got {last_queries}")
    tokens, warnings = readable(loaded, text, last_queries=last_queries)
    config, model, started = loaded.config, loaded.model, time.perf_counter()
    ids = torch.from_numpy(tokens.ids)[None].to(loaded.device)
    cache = WatchedCache(config=config)
    recorder = _Recorder(len(tokens), len(cache.layers), last_queries, look, progress)
    with looking_into(loaded, cache, recorder.look):
        logits = last_logits(model, ids, cache)
        check_finite(loaded, logits)
        next_token = logits.argmax(-1, keepdim=True)
        recorder.probing = True
        last_logits(model, next_token, cache)
    check_shown(loaded, min(recorder.recorded, recorder.probed), len(cache.layers))
    windows = [getattr(cache.layers[source], "sliding_window", 0) for source in recorder.sources]
    return Capture(
        model=loaded.name,
        architecture=type(model).__name__,
        device=str(loaded.device),
        dtype=loaded.dtype,
        stored=loaded.stored,
        text=text,
        labels=tokens.labels,
        probe_label=str(loaded.tokenizer.decode(next_token[0])),
        layer_kinds=tuple("sliding" if window else "full" for window in windows),
        windows=tuple(windows),
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
        head_dim=CacheShape.of(config, model.dtype.itemsize).head_dim,
        tokens_per_bin=recorder.bin_width,
        token_ids=tokens.ids,
        token_spans=tokens.spans,
        **{name: values.numpy() for name, values in recorder.finished(loaded.device).items()},
    )


def readable(loaded: LoadedModel, text: str, *, last_queries: int = 0) -> tuple[Tokens, list[str]]:
    """Tokenize a text, check that it can be captured, and collect warnings: all that can be known beforehand.

    Raises:
        TextError, OutOfMemoryError, ModelError: as `capture`.
    """
    check_estimate(loaded, text, last_queries=last_queries)
    tokens = tokenize(loaded.tokenizer, text)
    warnings = [*tokens.notes, *check_length(loaded, tokens)]
    if unknown := set(layer_kinds(loaded.config)) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"{loaded.name} has layers that are not supported yet: {', '.join(sorted(unknown))}.")
    heterogeneous = getattr(loaded.config, "is_heterogeneous", False)  # Gemma 4
    if heterogeneous and len({layer.num_key_value_heads for layer in loaded.config.per_layer_config}) > 1:
        raise ModelError(f"{loaded.name} has different numbers of kv heads by layer, which is not supported yet.")
    check_fits(loaded, len(tokens), last_queries=last_queries)
    return tokens, warnings


@contextmanager
def looking_into(loaded: LoadedModel, cache: WatchedCache, look: Callable[[Look], object]) -> Iterator[None]:
    """Run the model without gradients within the block, and call `look` before each layer's attention over `cache`.

    Raises:
        OutOfMemoryError, ModelError: as `capture`.
    """
    try:
        with memory_errors(), torch.inference_mode(), watching(loaded.model, cache, look):
            yield
    except UnsupportedModelError as error:
        raise ModelError(str(error)) from error


def check_finite(loaded: LoadedModel, computed: Tensor) -> None:
    """Raise ModelError if the model computes NaN or infinity."""
    if not computed.isfinite().all():
        raise ModelError(f"{loaded.name} computes NaN or infinity on this text; its weights may be damaged.")


def check_shown(loaded: LoadedModel, n_shown: int, n_layers: int) -> None:
    """Raise ModelError unless the attention of every layer was seen."""
    if n_shown != n_layers:
        raise ModelError(
            f"{type(loaded.model).__name__} showed the attention of {n_shown} of its {n_layers} "
            "layers: the others are of another kind, or bypass transformers' attention registry."
        )


def check_estimate(loaded: LoadedModel, text: str, *, last_queries: int = 0) -> None:
    """Refuse a text that is far too long before it is tokenized, which would take long, too.

    Raises:
        TextError, OutOfMemoryError: as `capture`, with about how many tokens the text has.
    """
    if len(text) < LONG:
        return
    about, limit = about_tokens(loaded.tokenizer, text), getattr(loaded.config, "max_position_embeddings", None)
    surely = about // 2  # stretches of a text may have twice the tokens of the rest
    if limit is not None and surely > limit and getattr(loaded.config, "rope_parameters", None) is None:
        raise TextError(
            f"The text has about {about:,} tokens; {loaded.name} has positions for {limit:,}. Shorten it to some "
            f"{len(text) * limit // about:,} characters."
        )
    try:
        check_fits(loaded, surely, last_queries=last_queries)
    except OutOfMemoryError:
        check_fits(loaded, about, last_queries=last_queries)


def check_fits(loaded: LoadedModel, n_tokens: int, *, last_queries: int = LAST_QUERIES) -> int:
    """Estimate a capture of `n_tokens`. Raises OutOfMemoryError, naming the length that would fit."""
    itemsize, allowed = loaded.model.dtype.itemsize, usable_bytes(loaded.device)

    def needed(n: int) -> int:
        return capture_bytes(loaded.config, n, itemsize=itemsize, last_queries=last_queries)

    if needed(n_tokens) <= allowed:
        return needed(n_tokens)
    fits, too_long = 0, n_tokens
    while too_long - fits > 1:  # the estimate grows with n
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if needed(middle) <= allowed else (fits, middle)
    raise OutOfMemoryError(
        f"A text of {n_tokens:,} tokens would take about {human_bytes(needed(n_tokens))} beyond the model, and "
        f"{human_bytes(allowed)} may be used. Shorten it to about {fits:,} tokens."
    )


def check_length(loaded: LoadedModel, tokens: Tokens, *, new_tokens: int = 1) -> list[str]:
    """Warn of a long text. Raises TextError if the model cannot take it at all."""
    n, limit = len(tokens), getattr(loaded.config, "max_position_embeddings", None)
    if n < MIN_TOKENS:
        raise TextError(f"The text has {counted(n, 'token')}; at least {MIN_TOKENS} are needed to rank them.")
    if tokens.ids.max() >= getattr(loaded.model.get_input_embeddings(), "num_embeddings", sys.maxsize):
        raise TextError(
            "The tokenizer gives tokens that the model lacks: they do not belong together. Give the model's own."
        )
    if limit is None or limit < 1 or n + new_tokens <= limit:  # XLNet: -1
        return []
    if getattr(loaded.config, "rope_parameters", None) is None:
        raise TextError(
            f"The text has {n} tokens, and {new_tokens} more are run after it; {loaded.name} has positions for "
            f"{limit}. Shorten it to {max(limit - new_tokens, 0)} tokens."
        )
    return [
        f"With {n + new_tokens} tokens it goes beyond the {limit} that {loaded.name} was trained on: expect it to fail."
    ]


def last_logits(model: nn.Module, ids: Tensor, cache: WatchedCache) -> Tensor:
    """Compute the logits [1, V] after the last token only: all would take T * V numbers."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(ids, past_key_values=cache, use_cache=True, **only_last).logits[:, -1]


class _Recorder:
    """Recorder of key norms and attention while the model runs."""

    def __init__(
        self,
        n_tokens: int,
        n_layers: int,
        last_queries: int,
        look_too: Callable[[Look], object],
        progress: Progress,
    ) -> None:
        self.n_tokens, self.n_layers, self.look_too, self.progress = n_tokens, n_layers, look_too, progress
        self.last_queries = min(last_queries, n_tokens)
        self.bin_width = -(-n_tokens // MAX_BINS)
        self.results: dict[str, Tensor] = {}  # fields of `Capture`, in the host's memory
        self.recorded = self.probed = 0  # layers
        self.sources: list[int] = []  # of each layer, that which caches its keys
        self.probing = False

    def look(self, at: Look) -> None:
        if not self.results:
            self._allocate(at.query.shape[1], at.key.shape[1], at.key.device)
        if at.key.shape[1] != self.results["key_norm"].shape[1]:
            raise UnsupportedModelError(
                "This model has different numbers of kv heads by layer, which is not supported yet."
            )
        attention = _Attention(at)
        if self.probing:
            self._record_probe(attention, at.layer_idx)
        else:
            self.sources.append(at.source)
            self.look_too(at)
            self._record_prompt(attention, at.key[0], at.value[0], at.layer_idx)

    def finished(self, device: torch.device) -> dict[str, Tensor]:
        """The results, when all of them have come from the device."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.results

    def _allocate(self, heads: int, kv_heads: int, device: torch.device) -> None:
        # All at once, before the first layer: small arrays that stay, between large ones that go, fragment the heap.
        layers, n, bins = self.n_layers, self.n_tokens, -(-self.n_tokens // self.bin_width)
        self.last_queries = min(self.last_queries, RECENT_BYTES // (4 * layers * heads * n))
        # Into pinned memory a GPU copies while it goes on computing.
        empty = partial(torch.empty, dtype=torch.float32, pin_memory=device.type == "cuda")
        self.results = {
            "key_norm": empty((layers, kv_heads, n)),
            "value_norm": empty((layers, kv_heads, n)),
            "attention_received": empty((layers, heads, n)),
            "probe_attention": empty((layers, heads, n)).zero_(),
            "recent_attention": empty((self.last_queries, layers, heads, n)),
            "pooled_attention": empty((layers, heads, bins, bins), dtype=torch.uint8),
            "pooled_scale": empty((layers, heads)),
        }

    def _record_prompt(self, attention: _Attention, key: Tensor, value: Tensor, layer: int) -> None:
        received, pooled = _summarise(attention, self.bin_width, on_block=self._report)
        scale = pooled.amax(dim=(1, 2)).clamp_min(1e-12)
        root = (pooled / scale[:, None, None]).sqrt()  # square root: small shares keep some of the 256 steps
        for name, values in {
            "key_norm": key.float().norm(dim=-1),
            "value_norm": value.float().norm(dim=-1),
            "attention_received": received,
            "pooled_attention": (root * 255).round().to(torch.uint8),
            "pooled_scale": scale,
        }.items():
            self.results[name][layer].copy_(values, non_blocking=True)
        if self.last_queries:
            first = self.n_tokens - self.last_queries
            rows = attention.probabilities(first, self.n_tokens).tril(first - 1)  # own columns are dropped
            for kept, row in zip(self.results["recent_attention"][:, layer], rows.unbind(1), strict=True):
                kept.copy_(row, non_blocking=True)
        self.recorded += 1
        self._report()

    def _report(self) -> None:
        self.progress(self.recorded, self.n_layers, "layers")

    def _record_probe(self, attention: _Attention, layer: int) -> None:
        row = attention.probabilities(0, 1)[:, 0, :-1]  # its own column is dropped; the row is not renormalised
        # A sliding window holds the latest tokens only: to the others it pays nothing.
        self.results["probe_attention"][layer, :, self.n_tokens - row.shape[1] :].copy_(row, non_blocking=True)
        self.probed += 1


class _Attention:
    """The attention probabilities of one layer over one text, block by block."""

    def __init__(self, at: Look) -> None:
        self.query, self.key, self.options = at.query, at.key, at.options  # [1, H, q, D], [1, Hkv, n, D]
        self.n_heads, self.n_queries = at.query.shape[1:3]
        self.n_keys = at.key.shape[2]
        self.mask = at.mask

    @property
    def causal(self) -> bool:
        """True if each query sees the keys up to its own, and there are no others."""
        return self.mask is None and self.n_queries == self.n_keys

    def probabilities(self, start: int, end: int) -> Tensor:
        """Of the queries start..end: float32 [H, end - start, n], n the keys that any of them can see."""
        before = self.n_keys - self.n_queries  # keys that precede the first query
        query, key = self.query[:, :, start:end], self.key[:, :, : before + end]
        return attention_probabilities(query, key, lambda scores: self._hide(scores, start), self.options)[0]

    def _hide(self, scores: Tensor, start: int) -> None:
        rows, seen = scores.shape[2:]
        if self.mask is None:
            hide_unseen(scores, seen - rows)
            return
        mask = self.mask[..., start : start + rows, :seen]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores += mask

    def visible(self) -> Tensor:
        """How many of the queries can see each key, [1 or H, n]."""
        if self.mask is None:
            return torch.arange(self.n_keys, 0, -1, device=self.key.device)[None]
        mask = self.mask[0]
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return shown.sum(dim=1)


def _summarise(attention: _Attention, width: int, on_block: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Mean attention received [H, n], and the map pooled in bins of `width` tokens [H, P, P] (rows sum to 1)."""
    if attention.causal and kernels.enabled(attention.key.device):
        from l2kv.kernels.statistics import attention_statistics

        on_block()
        total, pooled, _ = attention_statistics(attention.query, attention.key, width=width, options=attention.options)
    else:
        total, pooled = _sum_blocks(attention, width, on_block)
    n, bins = attention.n_keys, pooled.shape[1]
    in_bin = torch.full((bins, 1), float(width), device=total.device)
    in_bin[-1] = n - (bins - 1) * width
    return total / attention.visible().clamp_min(1), pooled / in_bin


def _sum_blocks(attention: _Attention, width: int, on_block: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Sums of the attention that each key receives [H, n], and over each cell of bins [H, P, P]."""
    n, heads = attention.n_keys, attention.n_heads
    bins = -(-n // width)
    total = attention.query.new_zeros(heads, n, dtype=torch.float32)
    pooled = total.new_zeros(heads, bins, bins)
    block = max(1, BLOCK // width) * width  # whole bins
    for start in range(0, n, block):
        on_block()
        end = min(start + block, n)
        rows = _sum_bins(attention.probabilities(start, end), dim=1, width=width)  # [H, bins of the block, end]
        total[:, :end] += rows.sum(dim=1)
        columns = _sum_bins(rows, dim=2, width=width)
        first = start // width
        pooled[:, first : first + rows.shape[1], : columns.shape[2]] = columns
    return total, pooled


def _sum_bins(x: Tensor, *, dim: int, width: int) -> Tensor:
    """Sum [H, a, b] over runs of `width` along `dim`; the last run may be shorter."""
    if width == 1:
        return x
    short = -x.shape[dim] % width
    if short:
        x = nn.functional.pad(x, (0, short) if dim == 2 else (0, 0, 0, short))
    return x.unflatten(dim, (-1, width)).sum(dim=dim + 1)
