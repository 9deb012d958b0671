"""The masked full forward of `tests.support.oracle` for one row of any architecture, and for pairs that are rounded.

Of a pair that is stored in fewer bits or channels, a query sees what is left of it, worked out here number by number.
"""

import math

import torch

from l2kv import CompressedCache, CompressionSpec
from l2kv.layer import CompressedLayer
from tests.support.oracle import attending, replay, target


def evicting_layers(model):
    layers = CompressedCache(model.config, CompressionSpec()).layers
    return [i for i, layer in enumerate(layers) if isinstance(layer, CompressedLayer)]


def masked_forward(model, ids, chunks, spec):
    """Logits [1, T, V] and kept[layer][kv head] -> positions: `tests.support.oracle.masked_forward` of one row, for
    attention with a soft cap (Gemma 2), with sinks (gpt-oss), and with windows, where nothing is evicted and all that
    is further away is hidden.
    """
    evicting, kept, keys_of, stored = evicting_layers(model), {}, {}, {}

    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **_):
        kv_heads, total, width = key.shape[1:]
        group = query.shape[1] // kv_heads
        scale = width**-0.5 if scaling is None else scaling
        queries = query[0].unflatten(0, (kv_heads, group))  # [Hkv, G, T, D]
        sinks = torch.zeros(kv_heads, group) if s_aux is None else s_aux.exp().view(kv_heads, group)
        distance = torch.arange(total)[:, None] - torch.arange(total)
        seen = [(distance >= 0) & (distance < (sliding_window or total))] * kv_heads
        layer = next((i for i, keys in keys_of.items() if torch.equal(keys, key)), module.layer_idx)  # it may borrow

        def odds_of(keys):
            scores = queries @ keys[:, None].transpose(-1, -2) * scale
            return (scores if softcap is None else torch.tanh(scores / softcap) * softcap).exp()  # [Hkv, G, T, T]

        odds, rounded = odds_of(key[0]), torch.zeros(total, total, dtype=torch.bool)
        values = value[0]
        if layer in evicting:
            assert sliding_window is None

            def replayed(h, chunks):
                ratio = target(spec, layer, h)[0]
                scores = (-key[0, h].pow(2).sum(-1).sqrt()).tolist()
                if spec.policy == "accumulated":
                    scores = received(odds[h], sinks[h])
                skipped = layer in spec.skip_layers
                return replay(scores, chunks, keep_ratio=ratio, protect_last=spec.protect_last, skipped=skipped)

            if layer not in keys_of:
                first = [replayed(h, chunks[:1])[1] for h in range(kv_heads)]
                stored[layer] = what_is_left(queries, key[0], value[0], first, chunks[0], spec)
            rounded = rounded if layer in spec.skip_layers else coded(chunks, spec.protect_last)
            odds = torch.where(rounded, odds_of(stored[layer][0]), odds)
            values = stored[layer][1]
            seen, kept[layer] = zip(*(replayed(h, chunks) for h in range(kv_heads)), strict=True)
            seen = [torch.tensor(of_head) for of_head in seen]
        keys_of[layer] = key
        odds = odds * torch.stack(seen)[:, None]
        weights = odds / (odds.sum(-1, keepdim=True) + sinks[..., None, None])
        mixed = (weights * ~rounded) @ value[0, :, None] + (weights * rounded) @ values[:, None]
        return mixed.flatten(0, 1).transpose(0, 1)[None], None

    with attending(model, attention), torch.no_grad():
        return model(ids, use_cache=False).logits, {layer: list(heads) for layer, heads in kept.items()}


def received(odds, sinks):
    """Scores for `replay`: the attention that each token held has got so far from the queries [G, T, T] of one head."""
    total, start = torch.zeros(odds.shape[-1]), 0

    def scores(held, seen):
        nonlocal start
        for query in range(start, seen):  # what is held now is what they saw, but for those to come
            keys = [p for p in held if p <= query]
            total[keys] += (odds[:, query, keys] / (odds[:, query, keys].sum(-1) + sinks)[:, None]).sum(0)
        start = seen
        return total.tolist()

    return scores


def coded(chunks, window):
    """Whether a query [T] sees of a key [T] what is left of it: not in its own step, and not among the latest."""
    rows, start = [], 0
    for chunk in chunks:
        rows += [[key < start - window for key in range(sum(chunks))]] * chunk
        start += chunk
    return torch.tensor(rows)


def what_is_left(queries, keys, values, first, prompt, spec):
    """Keys and values [Hkv, T, D] after rounding, by heads that kept the tokens `first` of a prompt."""
    of_keys, of_values = torch.zeros_like(keys), values.clone()
    for h, kept in enumerate(first):
        of_queries = queries[h, :, max(0, prompt - 32) : prompt].flatten(0, 1).tolist()
        channels = heaviest(of_queries, [keys[h, t].tolist() for t in kept], spec.key_channels)
        narrow = keys[h, :, channels]
        of_keys[h, :, channels] = narrow if spec.key_bits is None else by_hand(narrow, spec.key_bits, kept)
        if spec.value_bits is not None:
            of_values[h] = by_hand(values[h], spec.value_bits)
    return of_keys, of_values


def heaviest(queries, keys, share):
    """The channels of the largest products of squares, ascending."""
    width = len(keys[0])
    weight = [sum(q[c] ** 2 for q in queries) * sum(k[c] ** 2 for k in keys) for c in range(width)]
    return sorted(sorted(range(width), key=lambda c: -weight[c])[: math.ceil(round(share * width, 9))])


def by_hand(vectors, bits, fitted_to=None):
    """Vectors [T, C], each number rounded to one of 2^bits between the lowest and the highest of its vector.

    Where they are fitted to some tokens, channels are brought to the range that they have there, and back.
    """
    rows = vectors.double().tolist()
    middle, reach = [0.0] * len(rows[0]), [1.0] * len(rows[0])
    if fitted_to is not None:
        columns = [[rows[t][c] for t in fitted_to] for c in range(len(rows[0]))]
        middle = [(max(column) + min(column)) / 2 for column in columns]
        reach = [(max(column) - min(column)) / 2 for column in columns]
        reach = [max(x, 0.1 * sum(reach) / len(reach)) or 1.0 for x in reach]
    rounded = []
    for row in rows:
        even = [(x - m) / r for x, m, r in zip(row, middle, reach, strict=True)]
        step = (max(even) - min(even)) / (2**bits - 1)
        codes = [round((x - min(even)) / step) for x in even] if step else [0] * len(even)
        rounded.append([(min(even) + n * step) * r + m for n, m, r in zip(codes, middle, reach, strict=True)])
    return torch.tensor(rounded).to(vectors.dtype)
