"""What compressed decoding must give, worked out the slow way: one full forward pass with evicted tokens masked.

Shares no code with the cache. Layer by layer it takes the keys of ALL tokens, replays the eviction with Python lists,
and hides from each query exactly the tokens that were gone when it was fed.
"""

import math
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def replay(
    scores,
    chunks,
    *,
    keep_ratio,
    budget=None,
    schedule="seen",
    evict_every=1,
    prune_after=0,
    protect_first=0,
    protect_last=0,
    skipped=False,
):
    """One kv head: `scores` (higher = keep) of all tokens, fed in `chunks` -> (visible [T][T] bool, kept positions).

    `scores(held, seen)` may also be a function: the scores, by position, at an eviction of those held then.
    """
    total = sum(chunks)
    visible = [[False] * total for _ in range(total)]
    held, seen, last_eviction = [], 0, 0
    for chunk in chunks:
        for query in range(seen, seen + chunk):
            for key in [*held, *range(seen, query + 1)]:
                visible[query][key] = True
        held += range(seen, seen + chunk)
        seen += chunk
        if seen - last_eviction < evict_every:
            continue
        last_eviction = seen
        if skipped or len(held) < prune_after:
            continue
        now = scores(held, seen) if callable(scores) else scores
        safe = [p for p in held if p < protect_first or p >= seen - protect_last]
        others = sorted((p for p in held if p not in safe), key=lambda p: (-now[p], p))
        base = seen if schedule == "seen" else len(held)
        target = math.ceil(round(keep_ratio * base, 9)) if budget is None else budget
        held = sorted(safe + others[: max(0, target - len(safe))])
    return visible, held


@contextmanager
def attending(model, function):
    before = model.config._attn_implementation
    AttentionInterface.register("oracle", function)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.set_attn_implementation("oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def target(spec, layer, head):
    """(ratio, budget) of a head, by the order of precedence."""
    for (at, kv_head), ratio in spec.head_ratios or ():
        if (at, kv_head) == (layer, head):
            return ratio, None
    for at, ratio in spec.layer_ratios or ():
        if at == layer:
            return ratio, None
    return spec.keep_ratio, spec.budget


def masked_forward(model, ids, chunks, spec, scores=None):
    """Logits [B, T, V] and kept[layer][row][kv head] -> list of positions.

    `scores(layer, keys [Hkv, T, D]) -> [Hkv, T]` replaces the norm for policies that do not go by it.
    """
    kept = []

    def attention(module, query, key, value, mask, scaling=None, **_):
        batch, kv_heads, total, _ = key.shape
        hide = torch.full((batch, query.shape[1], total, total), -torch.inf, device=key.device)
        group = query.shape[1] // kv_heads
        rows = []
        for b in range(batch):
            sign = {"low_norm": -1.0, "high_norm": 1.0}.get(spec.policy)
            ranked = (key[b].float() ** 2).sum(-1).sqrt() * sign if scores is None else scores(module.layer_idx, key[b])
            heads = []
            for h in range(kv_heads):
                ratio, budget = target(spec, module.layer_idx, h)
                visible, held = replay(
                    ranked[h].tolist(),
                    chunks,
                    keep_ratio=ratio,
                    budget=budget,
                    schedule=spec.schedule,
                    evict_every=spec.evict_every,
                    prune_after=spec.prune_after,
                    protect_first=spec.protect_first,
                    protect_last=spec.protect_last,
                    skipped=module.layer_idx in spec.skip_layers,
                )
                for position in spec.pinned:
                    for later in range(position, total):
                        visible[later][position] = True
                held = sorted({*held, *spec.pinned})
                hide[b, h * group : (h + 1) * group].masked_fill_(torch.tensor(visible, device=key.device), 0.0)
                heads.append(held)
            rows.append(heads)
        kept.append(rows)
        dtype, (key, value) = query.dtype, (x.repeat_interleave(group, dim=1).float() for x in (key, value))
        weights = (query.float() @ key.transpose(-1, -2) * scaling + hide).softmax(-1)
        return (weights @ value).transpose(1, 2).to(dtype), None

    with attending(model, attention), torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return logits, kept


def eager(loaded, ids):
    """Attention [L, H, T, T] of the prompt, and [L, H, T + 1] of the greedy next token, by transformers itself."""
    model, before = loaded.model, loaded.model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            prompt = model(ids, output_attentions=True)
            longer = torch.cat([ids, prompt.logits[:, -1:].argmax(-1)], dim=1)
            after = model(longer, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return torch.cat(prompt.attentions).numpy(), torch.cat(after.attentions)[:, :, -1].numpy()
