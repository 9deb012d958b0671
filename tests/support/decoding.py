"""Compressed decoding in chunks, and the chunks in which most tests feed a text."""

import torch

from l2kv import compressible

ONE_BY_ONE = (20, *[1] * 12)
IN_CHUNKS = (17, 5, 1, 4, 1, 3, 1)


def decode(model, ids, chunks, cache):
    """Logits [B, T, V] of the chunks fed one after the other, each over the cache that the last one left."""
    start, logits = 0, []
    with compressible(model), torch.no_grad():
        for chunk in chunks:
            logits.append(model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True).logits)
            start += chunk
    return torch.cat(logits, dim=1)


def kept_sets(cache):
    """As the oracle has them: [layer][row][kv head] -> list of positions."""
    return [
        [[head[row].tolist() for head in heads] for row in range(heads[0].shape[0])]
        for heads in (cache.kept_positions(i) for i in range(len(cache)))
    ]
