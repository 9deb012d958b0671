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
from tests.support.causal_models import (
    CLASSES,
    PAGE,
    TEXT,
    captured,
    compress,
    compression,
    decode,
    model_of,
    text_for,
    tokenizer,
)
from tests.support.causal_oracle import masked_forward, plain_cache

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


def policy_for(model, ids):
    """By norm, but where the model gives all keys of a head the same norm, which rounding would rank."""
    layers = [layer for layer in plain_cache(model, ids).layers if getattr(layer, "keys", None) is not None]
    norms = [layer.keys.norm(dim=-1) for layer in layers]
    return "streaming" if any((n.amax(-1) / n.amin(-1)).min() < 1 + 1e-4 for n in norms) else "low_norm"


def assert_right(model, spec, chunks):
    ids = text_for(sum(chunks))
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
    policy = policy_for(model, text_for(20))
    assert_right(model, CompressionSpec(keep_ratio=0.5, policy=policy), CHUNKS)
    assert_right(model, CompressionSpec(keep_ratio=0.5, policy=policy, head_ratios=SHARES), CHUNKS)


@pytest.mark.parametrize("model_type", COMPRESSED)
def test_so_it_does_through_its_eager_attention_and_in_pieces_of_a_text(model_type):
    model = model_of(model_type)
    model.set_attn_implementation("eager")
    ids = text_for(sum(IN_CHUNKS))
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
