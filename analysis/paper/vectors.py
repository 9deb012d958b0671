"""Query and key vectors of each layer over a text, and the attention that follows from them.

A capture keeps norms; this keeps vectors, one layer at a time, so that keys can be changed and the attention worked out
again. Attention is the model's own (scaling, soft cap, sinks, window), in blocks of queries. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from analysis.errors import SettingsError
from analysis.models.load import LoadedModel
from analysis.models.memory import BLOCK, MAX_BINS
from analysis.progress import Progress, unheard
from analysis.recorder import check_finite, check_shown, last_logits, looking_into, readable
from l2kv import UnsupportedModelError
from l2kv.hooks import Look, WatchedCache
from l2kv.probabilities import attention_probabilities, hide_unseen


@dataclass(frozen=True, slots=True, eq=False)
class HeadVectors:
    """One layer over one text of T tokens: H query heads on Hkv kv heads of D numbers."""

    layer: int
    queries: np.ndarray  # [H, T, D] float32, after rotary embedding and any q/k norm
    keys: np.ndarray  # [Hkv, T, D] float32, as cached: after the same
    scaling: float  # of the product of a query and a key
    softcap: float | None  # Gemma 2: scores s become cap * tanh(s / cap)
    sinks: np.ndarray | None  # [H], gpt-oss: a logit per head that takes attention and gives nothing
    window: int  # keys that a query sees, its own included; 0 is all
    dtype: str = "float32"  # in which the model had them

    @property
    def n_heads(self) -> int:
        """Number of query heads, H."""
        return self.queries.shape[0]

    @property
    def n_tokens(self) -> int:
        """Number of tokens, T."""
        return self.queries.shape[1]

    def keys_of(self, head: int) -> np.ndarray:
        """Keys [T, D] that a query head reads."""
        return self.keys[head * len(self.keys) // self.n_heads]


def head_vectors(loaded: LoadedModel, text: str, layer: int, *, progress: Progress = unheard) -> HeadVectors:
    """Read queries and keys of one layer, in one pass over a text.

    Raises:
        SettingsError: the layer is out of range.
        TextError, OutOfMemoryError, ModelError: as `capture`.
    """
    n_layers = loaded.config.num_hidden_layers
    if not 0 <= layer < n_layers:
        raise SettingsError(f"layer must be 0 to {n_layers - 1}, got {layer}")
    found: list[HeadVectors] = []
    each_layer(loaded, text, found.append, only=layer, progress=progress)
    return found[0]


def each_layer(
    loaded: LoadedModel,
    text: str,
    visit: Callable[[HeadVectors], object],
    *,
    only: int | None = None,
    progress: Progress = unheard,
) -> None:
    """Call `visit` with the vectors of each layer, or of one, in one pass; memory holds one layer at a time.

    `progress` counts layers; an exception from it or from `visit` cancels. Raises as `capture`.
    """
    tokens, _ = readable(loaded, text)
    cache = WatchedCache(config=loaded.config)
    done, n_layers = 0, len(cache.layers)

    def look(at: Look) -> None:
        nonlocal done
        if only in (None, at.layer_idx):
            visit(_vectors_of(at, getattr(cache.layers[at.source], "sliding_window", 0)))
        done += 1
        progress(done, n_layers, "layers")

    ids = torch.from_numpy(tokens.ids)[None].to(loaded.device)
    with looking_into(loaded, cache, look):
        check_finite(loaded, last_logits(loaded.model, ids, cache))
    check_shown(loaded, done, n_layers)


def attention_rows(
    vectors: HeadVectors, head: int, *, keys: np.ndarray | None = None, block: int = BLOCK
) -> Iterator[np.ndarray]:
    """Yield the attention of a head, `block` queries at a time: float32 [q, T] over T keys; 0 where hidden.

    Args:
        keys: [T, D], instead of the head's own.
    """
    key = torch.from_numpy(vectors.keys_of(head) if keys is None else keys)[None, None]
    for start in range(0, vectors.n_tokens, block):
        query = torch.from_numpy(vectors.queries[head, start : start + block])[None, None]
        hide = partial(hide_unseen, first_query=start, window=vectors.window)
        yield attention_probabilities(query, key, hide, _options(vectors, head))[0, 0].numpy()


def pooled_attention(vectors: HeadVectors, head: int, *, keys: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Pool the attention of a head into P <= 128 bins a side: [P, P] float32, and the number of tokens in a bin.

    A row is a bin of queries, a column a bin of keys; rows sum to 1, as in `Capture.pooled`.
    """
    n = vectors.n_tokens
    width = -(-n // MAX_BINS)
    starts = np.arange(0, n, width)
    rows = [
        np.add.reduceat(np.add.reduceat(rows, starts, axis=1), np.arange(0, len(rows), width), axis=0)
        for rows in attention_rows(vectors, head, keys=keys, block=max(1, BLOCK // width) * width)
    ]
    in_bin = np.minimum(starts + width, n) - starts
    return np.concatenate(rows) / in_bin[:, None].astype(np.float32), width


def last_rows(vectors: HeadVectors, keys: np.ndarray) -> np.ndarray:
    """Attention of the last query of each head to the given keys [H, n, D]: [H, n] float32."""
    query = torch.from_numpy(vectors.queries[:, -1:])[None]
    row = attention_probabilities(query, torch.from_numpy(keys)[None], lambda scores: None, _options(vectors))
    return row[0, :, 0].numpy()


def _vectors_of(at: Look, window: int) -> HeadVectors:
    """Raises UnsupportedModelError where a mask hides more than the future and what is outside a window."""
    scaling, sinks, n = at.options.get("scaling"), at.options.get("s_aux"), at.key.shape[2]
    if at.mask is not None:
        shown = at.mask if at.mask.dtype == torch.bool else at.mask == 0
        scores = torch.zeros(1, 1, n, n, device=shown.device)
        hide_unseen(scores, 0, window)
        if not torch.equal(shown, (scores == 0).expand_as(shown)):
            raise UnsupportedModelError(
                "This model's attention mask hides more than the future and a window, which is not supported yet."
            )
    return HeadVectors(
        layer=at.layer_idx,
        queries=at.query[0].float().cpu().numpy(),
        keys=at.key[0].float().cpu().numpy(),
        scaling=at.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=at.options.get("softcap"),
        sinks=None if sinks is None else sinks.float().reshape(-1).cpu().numpy(),
        window=window,
        dtype=str(at.key.dtype).removeprefix("torch."),
    )


def _options(vectors: HeadVectors, head: int | None = None) -> dict[str, object]:
    chosen = slice(None) if head is None else slice(head, head + 1)
    sinks = None if vectors.sinks is None else torch.from_numpy(vectors.sinks[chosen])
    return {"scaling": vectors.scaling, "softcap": vectors.softcap, "s_aux": sinks}
