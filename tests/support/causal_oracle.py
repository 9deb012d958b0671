"""What compressed decoding must give in any class of model: one pass over the whole text that sees none of the evicted.

Shares no code with the cache. Unlike `tests.support.oracle` it knows soft caps, sinks, windows, images, and layers that
borrow the keys of others.
"""

import torch
from transformers import DynamicCache

from tests.support.oracle import attending, replay


class Noted(DynamicCache):
    """A plain cache that writes down in which order its layers are given keys."""

    def __init__(self, config):
        super().__init__(config=config)
        self.order = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.order.append(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def plain_cache(model, ids, **inputs):
    """After a forward pass over all tokens."""
    cache = Noted(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **inputs)
    return cache


def masked_forward(model, ids, spec, chunks, evicting, *, put_in=attending, **inputs):
    """Logits [1, T, V] of one pass over all tokens that sees none of the evicted, and kept[layer][kv head].

    Args:
        put_in: `put_in(model, attention)` is a context in which the language model attends so.
        inputs: of the forward pass beside the tokens: of an image, say, all of whose tokens are in the first chunk.
    """
    plain, total = plain_cache(model, ids, **inputs), ids.shape[1]
    causal = torch.ones(total, total).tril().bool()
    calls, kept, keys_of = iter(plain.order), {}, {}

    def layer_of(key):
        layer = next(calls, None)  # layers that borrow the keys of another come last
        if layer is None:
            return next(i for i, others in keys_of.items() if key.shape == others.shape and torch.equal(key, others))
        keys_of[layer] = key
        return layer

    def attention(module, query, key, value, attention_mask=None, scaling=None, softcap=None, s_aux=None, **_):
        layer = layer_of(key)
        heads, used, held = query.shape[1], key.shape[1], plain.layers[layer].keys.shape[1]
        used_by = [h // (heads // used) for h in range(heads)]  # which of the keys given
        in_turn = used > held and torch.equal(key[:, 0], key[:, held])
        held_by = [u % held if in_turn else u // (used // held) for u in used_by]  # which of those cached
        scores = query @ key[:, used_by].transpose(-1, -2) * (key.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if layer in evicting:
            replayed = [
                replay(ranking(spec, key[0, used_by[held_by.index(h)]]), chunks, keep_ratio=ratio(spec, layer, h))
                for h in range(held)
            ]
            kept[layer] = [positions for _, positions in replayed]
            shown = torch.tensor([visible for visible, _ in replayed])[held_by]
            if attention_mask is not None:  # the tokens of an image may see those of it that follow
                assert attention_mask[0, 0][causal].all()
                shown = shown | (attention_mask[0] & ~causal)
        else:  # transformers' own mask of its windows
            shown = causal if attention_mask is None else attention_mask[0]
        scores = scores[0].masked_fill(~shown, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(-1, 1, 1).expand(-1, total, 1)], dim=-1)
        weights = scores.softmax(-1)[..., :total]
        return (weights @ value[0, used_by]).transpose(0, 1)[None].contiguous(), None

    with put_in(model, attention), torch.no_grad():
        logits = model(ids, use_cache=False, **inputs).logits
    return logits, kept


def ranking(spec, keys):
    """What `replay` keeps the highest of."""
    if spec.policy == "streaming":
        return [p + 2.0**30 * (p < 4) for p in range(len(keys))]
    return (-keys.pow(2).sum(-1).sqrt()).tolist()


def ratio(spec, layer, head):
    return dict(spec.head_ratios or ()).get((layer, head), spec.keep_ratio)
