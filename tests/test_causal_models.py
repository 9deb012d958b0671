"""Every causal language model class of the pinned transformers: compressed and captured right, or refused.

Right is what a full forward pass with the evicted masked gives, and what the model's own eager attention shows; neither
shares code with the cache. `docs/architectures.md` says which classes are refused and why: that list may only shrink.
"""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig

from analysis import capture
from analysis.models.load import LoadedModel
from l2kv import CompressionSpec, compressible
from l2kv.layer import CompressedLayer
from tests.causal_models import CLASSES, PAGE, TEXT, captured, compress, compression, decode, model_of, tokenizer
from tests.oracle import _attention, replay

MOST_REFUSED = 51  # classes; never to be raised
TABLE = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][
    1:
]  # without its head
CELLS = (row.strip("| ").split(" | ") for row in TABLE)
ROWS = {model_type: cells for model_type, *cells in CELLS}
COMPRESSED = [model_type for model_type, (_, compressed, *_) in ROWS.items() if compressed != "no"]
CAPTURED = [model_type for model_type, (*_, looked_into) in ROWS.items() if looked_into == "yes"]
CHUNKS = (14, *[1] * 8)
IN_CHUNKS = (14, 1, 4, 3)
SHARES = {(i, 0): 0.3 for i in range(4)}  # of the first head of each layer, the others keep half


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these only wait for the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def masked_forward(model, ids, spec, chunks, evicting, *, put_in=_attention, **inputs):
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


def policy_for(model, ids):
    """By norm, but where the model gives all keys of a head the same norm, which rounding would rank."""
    layers = [layer for layer in plain_cache(model, ids).layers if getattr(layer, "keys", None) is not None]
    norms = [layer.keys.norm(dim=-1) for layer in layers]
    return "streaming" if any((n.amax(-1) / n.amin(-1)).min() < 1 + 1e-4 for n in norms) else "low_norm"


def text_for(model, n):
    return 2 + torch.randperm(150, generator=torch.Generator().manual_seed(1))[None, :n]


def assert_right(model, spec, chunks):
    ids = text_for(model, sum(chunks))
    cache, logits = compress(model, ids, spec, chunks)
    evicting = [i for i, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)]
    if not evicting:  # nothing is ours but the mask; not all such models are exact in pieces of a text
        assert torch.equal(logits, decode(model, ids, DynamicCache(config=model.config), chunks))
        return
    expected, kept = masked_forward(model, ids, spec, chunks, evicting)
    assert {i: [head[0].tolist() for head in cache.kept_positions(i)] for i in evicting} == kept
    torch.testing.assert_close(logits, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize("model_type", COMPRESSED)
def test_a_class_that_is_compressed_decodes_as_its_masked_forward_pass(model_type):
    model = model_of(model_type)
    policy = policy_for(model, text_for(model, 20))
    assert_right(model, CompressionSpec(keep_ratio=0.5, policy=policy), CHUNKS)
    assert_right(model, CompressionSpec(keep_ratio=0.5, policy=policy, head_ratios=SHARES), CHUNKS)


@pytest.mark.parametrize("model_type", COMPRESSED)
def test_so_it_does_through_its_eager_attention_and_in_pieces_of_a_text(model_type):
    model = model_of(model_type)
    model.set_attn_implementation("eager")
    ids = text_for(model, sum(IN_CHUNKS))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    exact = torch.allclose(decode(model, ids, DynamicCache(config=model.config), IN_CHUNKS), whole, atol=1e-3)
    chunks = IN_CHUNKS if exact else CHUNKS  # of running states, not all go on exactly with several tokens
    assert_right(model, CompressionSpec(keep_ratio=0.5, policy=policy_for(model, ids), head_ratios=SHARES), chunks)


@pytest.mark.parametrize("model_type", CAPTURED)
def test_a_capture_is_what_the_class_caches_and_what_its_eager_attention_shows(model_type):
    model = model_of(model_type)
    run = capture(LoadedModel(model, tokenizer(), "it"), TEXT)
    ids, n = torch.from_numpy(run.token_ids)[None], run.n_tokens
    plain = plain_cache(model, ids)
    for layer, cached in enumerate(plain.layers):
        if run.layer_kinds[layer] == "full" and getattr(cached, "keys", None) is not None:
            np.testing.assert_allclose(run.key_norm[layer], cached.keys[0].norm(dim=-1), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(run.value_norm[layer], cached.values[0].norm(dim=-1), rtol=1e-3, atol=1e-5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(ids, output_attentions=True, use_cache=False).attentions
    if not shown or shown[0] is None:
        pytest.skip(f"{model_type} shows no attention")
    attention = torch.cat([of_layer for of_layer in shown if of_layer is not None])[..., :n].numpy()
    assert len(attention) == run.n_layers
    if "SWA" in CLASSES[model_type]:  # it shows what its sinks leave as if it were all
        total = run.recent_attention[-1].sum(axis=-1, keepdims=True)
        expected = attention[:, :, n - 1, : n - 1] / attention[:, :, n - 1, : n - 1].sum(axis=-1, keepdims=True)
        np.testing.assert_allclose((run.recent_attention[-1] / total)[..., : n - 1], expected, atol=1e-4)
        return
    for query, row in zip(run.recent_positions, run.recent_attention, strict=True):
        np.testing.assert_allclose(row[..., :query], attention[:, :, query, :query], atol=1e-4)
    distance = np.arange(n)[:, None] - np.arange(n)
    windows = [  # Moshi's are of the cache alone
        n if not window or of_layer[:, distance >= window].any() else window
        for window, of_layer in zip(run.windows, attention, strict=True)
    ]
    seen_by = [np.minimum(np.arange(n, 0, -1), window) for window in windows]
    received = attention.sum(axis=2) / np.array(seen_by)[:, None]
    np.testing.assert_allclose(run.attention_received, received, atol=1e-4)


def state(model):
    """What preparing a model could leave behind."""
    configs = (getattr(module, "config", None) for module in model.modules())
    chosen = [config._attn_implementation for config in configs if isinstance(config, PretrainedConfig)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    registered = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    return chosen, hooks, registered


@pytest.mark.parametrize("model_type", sorted(CLASSES))
def test_what_is_done_or_refused_is_what_the_page_says_and_the_model_is_given_back_as_it_was(model_type):
    _, *said, looked_into = ROWS[model_type]
    assert (*said, looked_into) == (*compression(model_type), captured(model_type))
    if model_type in COMPRESSED or "registry" in said[1]:
        model = model_of(model_type)
        before = state(model)
        for spoiled in (False, True):
            try:
                with compressible(model):
                    assert not spoiled, "an exception in the block"
            except AssertionError as error:
                assert "in the block" in str(error)
        assert state(model) == before


def test_the_page_lists_every_class_in_order_and_the_list_of_refusals_only_shrinks():
    assert list(ROWS) == sorted(CLASSES)
    refused = len(ROWS) - len(COMPRESSED)
    assert refused <= MOST_REFUSED, "take nothing away from users"
    assert refused == MOST_REFUSED, "fewer are refused: lower MOST_REFUSED"
