"""Compressed decoding against the masked full forward pass, and the other duties of a cache."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)

from l2kv import POLICIES, CompressedCache, CompressionSpec, UnsupportedModelError, compressible, l2_compress
from l2kv.cache import cache_nbytes
from l2kv.policies import Pairs
from tests.support.architectures import ARCHITECTURES
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE, decode, kept_sets
from tests.support.models import TINY, build, tokens
from tests.support.oracle import masked_forward

TINY_LATENT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "moe_intermediate_size": 8,
}
TINY_LATENT |= {
    "num_attention_heads": 2,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
}


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("skip", [(), (0,), (1, 2)], ids=str)
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1])
def test_compressed_decoding_is_a_full_forward_with_the_evicted_masked(model, ratio, skip, chunks):
    ids = tokens(model, sum(chunks))
    spec = CompressionSpec(keep_ratio=ratio, skip_layers=skip)
    cache = CompressedCache(model.config, spec)
    logits = decode(model, ids, chunks, cache)
    expected, kept = masked_forward(model, ids, chunks, spec)
    assert kept_sets(cache) == kept
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "spec",
    [
        CompressionSpec(keep_ratio=0.4, policy="high_norm"),
        CompressionSpec(keep_ratio=0.3, protect_first=2, protect_last=5),
        CompressionSpec(keep_ratio=0.1, protect_last=25),
        CompressionSpec(keep_ratio=0.5, prune_after=24),
        CompressionSpec(keep_ratio=0.0),
        CompressionSpec(keep_ratio=0.0, protect_first=1),
        CompressionSpec(budget=9),
        CompressionSpec(budget=0, layer_ratios={1: 0.7}),
        CompressionSpec(keep_ratio=0.8, schedule="reference"),
        CompressionSpec(budget=11, schedule="reference", prune_after=14),
        CompressionSpec(keep_ratio=0.4, evict_every=4),
        CompressionSpec(keep_ratio=0.7, evict_every=6, schedule="reference", protect_last=2),
        CompressionSpec(keep_ratio=0.3, layer_ratios={0: 0.9, 2: 0.5}),
        CompressionSpec(keep_ratio=0.3, head_ratios={(0, 0): 0.9, (2, 1): 0.0}),
        CompressionSpec(head_ratios=[[0.2, 0.6], [None, 1.0], [0.1, 0.5]], layer_ratios={1: 0.3}, skip_layers=(2,)),
        CompressionSpec(budget=5, head_ratios={(1, 0): 0.8}, protect_last=3, protect_first=1, evict_every=3),
    ],
    ids=str,
)
def test_every_option_agrees_with_the_oracle_in_a_batch(tiny, spec):
    ids = tokens(tiny, sum(IN_CHUNKS), batch=3)
    cache = CompressedCache(tiny.config, spec)
    logits = decode(tiny, ids, IN_CHUNKS, cache)
    expected, kept = masked_forward(tiny, ids, IN_CHUNKS, spec)
    assert kept_sets(cache) == kept
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_random_keeps_the_same_tokens_however_the_text_is_cut_and_half_of_them(tiny):
    spec = CompressionSpec(keep_ratio=0.5, policy="random", seed=3)

    def scores(layer, keys):
        return POLICIES["random"].score(
            Pairs(keys[None], keys[None], torch.arange(keys.shape[1]), layer, (0, 1), spec.seed)
        )

    ids = tokens(tiny, sum(IN_CHUNKS))
    cache = CompressedCache(tiny.config, spec)
    logits = decode(tiny, ids, IN_CHUNKS, cache)
    expected, kept = masked_forward(tiny, ids, IN_CHUNKS, spec, scores)
    assert kept_sets(cache) == kept
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    layers_and_heads = {str(head) for layer in kept for head in layer[0]}
    assert len(layers_and_heads) == 6  # no two heads drew the same


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
def test_keeping_everything_gives_the_logits_of_the_plain_model(model, chunks):
    ids = tokens(model, sum(chunks))
    logits = decode(model, ids, chunks, CompressedCache(model.config, CompressionSpec(keep_ratio=1.0)))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


def test_bytes_are_really_freed_at_once_and_while_decoding(tiny):
    ids, spec = tokens(tiny, 100), CompressionSpec(keep_ratio=0.2, skip_layers=(0,))
    full, cache = DynamicCache(config=tiny.config), CompressedCache(tiny.config, spec)
    with torch.no_grad():
        tiny(ids, past_key_values=full)
    decode(tiny, ids, [100], cache)
    pair = 2 * 2 * 8 * 4  # K and V, 2 kv heads, head_dim 8, float32
    assert cache_nbytes(full) == 3 * 100 * pair
    assert cache.held == (100, 20, 20)
    assert 140 * pair <= cache.nbytes <= (100 + 2 * 24) * pair
    assert cache.nbytes == sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values)
    )


def test_decoding_copies_the_cache_now_and_then_not_at_every_token(tiny):
    cache = CompressedCache(tiny.config, CompressionSpec(keep_ratio=1.0))
    ids, moves, before = tokens(tiny, 120), 0, None
    with compressible(tiny), torch.no_grad():
        tiny(ids[:, :60], past_key_values=cache)
        for i in range(60, 120):
            tiny(ids[:, i : i + 1], past_key_values=cache)
            moves += cache.layers[0].keys.data_ptr() != before
            before = cache.layers[0].keys.data_ptr()
    assert moves <= 9


def test_generate_is_plain_generate_at_keep_1_greedy_sampled_and_with_beams(tiny):
    ids = tokens(tiny, 12)
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}):
        runs = []
        for spec in (None, CompressionSpec(keep_ratio=1.0)):
            torch.manual_seed(0)
            with compressible(tiny):
                cache = DynamicCache(config=tiny.config) if spec is None else CompressedCache(tiny.config, spec)
                runs.append(tiny.generate(ids, max_new_tokens=10, past_key_values=cache, **options))
        assert torch.equal(*runs), options


def test_generate_with_compression_is_decoding_step_by_step(tiny):
    ids, spec = tokens(tiny, 20), CompressionSpec(keep_ratio=0.4, skip_layers=(1,))
    with compressible(tiny):
        out = tiny.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=CompressedCache(tiny.config, spec))
    expected, _ = masked_forward(tiny, out, (20, *[1] * 8), spec)
    assert out[0, 20:].tolist() == expected[0, 19:-1].argmax(-1).tolist()


def test_one_cache_may_be_used_again_after_reset(tiny):
    ids, cache = tokens(tiny, 20), CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.5))
    first = decode(tiny, ids, [16, 4], cache)
    cache.reset()
    assert cache.held == (0, 0, 0) and cache.nbytes == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(decode(tiny, ids, [16, 4], cache), first)


def test_the_call_of_the_papers_readme(tiny):
    ids = tokens(tiny, 40)
    spec = CompressionSpec(keep_ratio=0.6, skip_layers=(0, 1))
    with compressible(tiny), torch.no_grad():
        outputs = tiny(ids[:, :30], use_cache=True)
        cache = l2_compress(outputs.past_key_values, keep_ratio=0.6, prune_after=10, skip_layers=[0, 1])
        assert cache.held == (30, 30, 18) and outputs.past_key_values.get_seq_length() == 30
        logits = tiny(ids[:, 30:], past_key_values=cache, use_cache=True).logits
        assert cache.held == (40, 40, 28)  # acts once: nothing more is evicted
        _, kept = masked_forward(tiny, ids[:, :30], (30,), spec)
        assert kept_sets(cache)[2][0][0] == [*kept[2][0][0], *range(30, 40)]
        again = l2_compress(cache, keep_ratio=0.5, skip_layers=[0])
    assert again.held == (40, 20, 14) and again.get_seq_length() == 40
    assert set(again.kept_positions(2)[1][0].tolist()) <= set(cache.kept_positions(2)[1][0].tolist())
    expected, _ = masked_forward(tiny, ids, (30, 10), spec)
    torch.testing.assert_close(logits, expected[:, 30:], atol=1e-4, rtol=0)


def test_every_option_of_l2_compress_is_heeded(tiny):
    ids = tokens(tiny, 30)
    options = {"keep_ratio": 0.5, "protect_first": 2, "protect_last": 6, "policy": "high_norm"}
    with compressible(tiny), torch.no_grad():
        cache = l2_compress(tiny(ids, use_cache=True).past_key_values, **options)
        _, kept = masked_forward(tiny, ids, (30,), CompressionSpec(**options))
        assert kept_sets(cache) == kept
        again = l2_compress(cache, keep_ratio=0.5)
    assert [layer.seen for layer in again.layers] == [30] * 3 and again.held == (8, 8, 8)


def test_l2_compress_leaves_the_cache_it_was_given_alone_windows_included():
    model = Gemma2ForCausalLM(Gemma2Config(**(TINY | {"sliding_window": 8}))).eval()
    ids = tokens(model, 40)
    with compressible(model), torch.no_grad():
        given = model(ids[:, :30], use_cache=True).past_key_values
        result = l2_compress(given, keep_ratio=0.5)
        model(ids[:, 30:35], past_key_values=result)
        after = model(ids[:, 30:35], past_key_values=given).logits
        torch.testing.assert_close(after, model(ids[:, :35]).logits[:, 30:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("decode_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("prefill_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_cache_passes_between_the_modes_of_autograd_and_holds_no_graph(tiny, prefill_mode, decode_mode):
    ids, cache = tokens(tiny, 24), CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.6))
    with compressible(tiny):
        with prefill_mode():
            tiny(ids[:, :20], past_key_values=cache)
        with decode_mode():
            for i in range(20, 24):
                logits = tiny(ids[:, i : i + 1], past_key_values=cache).logits
    assert not cache.layers[0].keys.requires_grad
    expected, _ = masked_forward(tiny, ids, (20, 1, 1, 1, 1), cache.spec)
    torch.testing.assert_close(logits[:, -1].detach(), expected[:, -1], atol=1e-4, rtol=0)
    copy.deepcopy(cache)


def test_beams_are_reordered_with_their_kept_tokens(tiny):
    """Beam search over a compressed cache: each beam must score as if it had been decoded alone."""
    ids, spec = tokens(tiny, 16), CompressionSpec(keep_ratio=0.5)
    with compressible(tiny):
        out = tiny.generate(
            ids,
            past_key_values=CompressedCache(tiny.config, spec),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=8,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        logits, _ = masked_forward(tiny, sequence[None, :-1], (16, *[1] * 7), spec)
        log_probabilities = logits[0, 15:].log_softmax(-1)
        alone = log_probabilities.gather(1, sequence[16:, None]).sum()
        assert score.item() == pytest.approx(alone.item(), abs=1e-3)


def test_chunked_prefill_of_generate_is_decoding_in_chunks(tiny):
    ids, spec = tokens(tiny, 20), CompressionSpec(keep_ratio=0.4)
    with compressible(tiny):
        cache = CompressedCache(tiny.config, spec)
        out = tiny.generate(ids, past_key_values=cache, prefill_chunk_size=7, max_new_tokens=4, do_sample=False)
    expected, _ = masked_forward(tiny, out, (7, 7, 6, 1, 1, 1, 1), spec)
    assert out[0, 20:].tolist() == expected[0, 19:-1].argmax(-1).tolist()


def test_steady_eviction_moves_a_few_pairs_not_the_buffer(tiny):
    cache, ids, buffers = CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.5)), tokens(tiny, 120), set()
    with compressible(tiny), torch.no_grad():
        tiny(ids[:, :60], past_key_values=cache)
        for i in range(60, 120):
            tiny(ids[:, i : i + 1], past_key_values=cache)
            buffers.add(cache.layers[1].keys.data_ptr())
    assert len(buffers) <= 8


def test_preparing_twice_is_given_back_at_the_last_restoring(tiny):
    first, second = compressible(tiny), compressible(tiny)
    first.restore()
    tiny(tokens(tiny, 6), past_key_values=CompressedCache(tiny.config, CompressionSpec()))
    second.restore()
    assert tiny.config._attn_implementation == "sdpa"


def test_an_interrupt_in_a_forward_pass_leaves_no_half_cache_in_use(tiny, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    cache = CompressedCache(tiny.config, CompressionSpec())
    with compressible(tiny):
        tiny(tokens(tiny, 6), past_key_values=cache)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tiny.model.layers[1].mlp, "forward", interrupt)
            tiny(tokens(tiny, 4), past_key_values=cache)
        with pytest.raises(RuntimeError, match="stopped half way"):
            tiny(tokens(tiny, 1), past_key_values=cache)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tiny.model.layers[1].mlp, "forward", interrupt)
            cache.reset()
            tiny(tokens(tiny, 4), past_key_values=cache)
    assert not cache.serving


def test_a_stock_model_is_told_what_to_do(tiny):
    with pytest.raises(RuntimeError, match=r"with compressible\(model\)"):
        tiny(tokens(tiny, 5), past_key_values=CompressedCache(tiny.config, CompressionSpec()))
    with torch.no_grad():
        once = l2_compress(tiny(tokens(tiny, 9), use_cache=True).past_key_values, keep_ratio=0.5, skip_layers=[0])
    with pytest.raises(RuntimeError, match="compressible"):
        tiny(tokens(tiny, 2), past_key_values=once)


def test_compressible_leaves_no_trace(tiny):
    before = (tiny.config._attn_implementation, set(AttentionInterface._global_mapping))
    with pytest.raises(ZeroDivisionError), compressible(tiny):
        assert tiny.config._attn_implementation != before[0]
        with compressible(tiny):
            pass
        decode(tiny, tokens(tiny, 6), [6], CompressedCache(tiny.config, CompressionSpec()))  # still prepared
        raise ZeroDivisionError
    assert (tiny.config._attn_implementation, set(AttentionInterface._global_mapping)) == before
    assert not tiny.base_model._forward_pre_hooks and not tiny.base_model._forward_hooks

    model = build("llama")
    with compressible(model):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_compressible_works_as_a_plain_call_too(tiny):
    handle = compressible(tiny)
    try:
        cache = CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.5))
        tiny(tokens(tiny, 10), past_key_values=cache)
        assert cache.held == (5, 5, 5)
    finally:
        handle.restore()
    handle.restore()
    assert tiny.config._attn_implementation == "sdpa"


def test_a_failed_forward_pass_lets_go_of_the_cache(tiny):
    cache = CompressedCache(tiny.config, CompressionSpec())
    with compressible(tiny):
        with pytest.raises(IndexError):
            tiny(torch.tensor([[10**6]]), past_key_values=cache)
        assert not cache.serving
        tiny(tokens(tiny, 4), past_key_values=cache)


def test_eager_attention_is_delegated_to(tiny):
    model, ids = build("llama", attn_implementation="eager"), tokens(tiny, 24)
    cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5, skip_layers=(0,)))
    expected, _ = masked_forward(tiny, ids, (16, 4, 4), cache.spec)
    torch.testing.assert_close(decode(model, ids, (16, 4, 4), cache), expected, atol=1e-4, rtol=0)


def test_a_sliding_window_is_left_whole():
    config = MistralConfig(**{**tiny_shape(), "sliding_window": 8})
    cache = CompressedCache(config, CompressionSpec(keep_ratio=0.5))
    model = MistralForCausalLM(config).eval()
    ids = tokens(model, 30)
    with torch.no_grad():
        torch.testing.assert_close(decode(model, ids, (20, 4, 6), cache), model(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="sliding window"):
        cache.kept_positions(0)


def tiny_shape() -> dict:
    return build("llama").config.to_dict() | {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config,reason",
    [
        (T5Config(), "decoder-only"),
        (BertConfig(), "decoder-only"),
        (MambaConfig(num_hidden_layers=2), "no key/value cache"),
        (DeepseekV3Config(num_hidden_layers=2), "latents"),
    ],
    ids=["t5", "bert", "mamba", "deepseek"],
)
def test_models_without_keys_to_rank_are_refused_with_the_reason(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        CompressedCache(config, CompressionSpec())


def test_a_model_that_bypasses_the_registry_is_refused():
    config = FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="Falcon"), compressible(model):
        model(tokens(model, 6), past_key_values=CompressedCache(config, CompressionSpec()))
    assert not model.config._attn_implementation.startswith("l2kv")


def test_bad_use_is_refused_with_what_was_wrong(tiny):
    with pytest.raises(ValueError, match="layer 7, but the layers are 0 to 2"):
        CompressedCache(tiny.config, CompressionSpec(skip_layers=(7,)))
    with pytest.raises(TypeError, match="tuple"):
        l2_compress(((torch.zeros(1), torch.zeros(1)),), keep_ratio=0.5)
    cache = CompressedCache(tiny.config, CompressionSpec())
    for mask in (torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 0, 1]]), torch.zeros(1, 1, 4, 4)):
        with pytest.raises(ValueError, match="padded on the left"), compressible(tiny):
            tiny(tokens(tiny, 4), attention_mask=mask, past_key_values=cache)
    with pytest.raises(TypeError, match="such as"):
        l2_compress(cache, skip_layers=3)
    with pytest.raises(UnsupportedModelError, match="latents"):
        compressible(DeepseekV3ForCausalLM(DeepseekV3Config(**TINY_LATENT)))
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-1)


def test_a_cache_that_was_compressed_again_and_goes_on_leaves_the_other_alone(tiny):
    ids, logits = tokens(tiny, 51), []
    for go_on in (False, True):
        cache = CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.5))
        decode(tiny, ids[:, :45], [40, 5], cache)
        once = l2_compress(cache, keep_ratio=0.5, skip_layers=[0, 1])
        if go_on:
            decode(tiny, ids[:, 45:50], [1] * 5, cache)
        logits.append(decode(tiny, ids[:, 50:], [1], once))
    assert torch.equal(*logits)


@pytest.mark.parametrize("policy", ["accumulated", "window", "last_query"])
def test_policies_that_go_by_attention_hold_no_graph_and_no_prompt(tiny, policy):
    cache = CompressedCache(tiny.config, CompressionSpec(keep_ratio=0.5, policy=policy))
    with compressible(tiny):
        for mode in (torch.no_grad, torch.no_grad, torch.enable_grad, torch.enable_grad, torch.no_grad):
            with mode():
                tiny(tokens(tiny, 50), past_key_values=cache)
                tiny(tokens(tiny, 1), past_key_values=cache)
    copy.deepcopy(cache)  # refused where a tensor has a history
    for layer in cache.layers:
        queries = layer._queries
        assert queries is None or queries.untyped_storage().nbytes() <= 32 * 6 * 8 * 4


def test_a_model_that_trains_with_checkpoints_is_told_so():
    model = build("llama", num_hidden_layers=2)
    model.activation_checkpointing_enable()
    cache = CompressedCache(model.config, CompressionSpec())
    with compressible(model), torch.no_grad():
        model(tokens(model, 20), past_key_values=cache)
        model.train()
        with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
            model(tokens(model, 3), past_key_values=cache)


def test_a_refused_crop_leaves_windows_as_they_are():
    model = ARCHITECTURES["Gemma 2"].model()  # every other layer has a window
    cache = CompressedCache(model.config, CompressionSpec())
    decode(model, tokens(model, 5), [5], cache)
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-1)
    assert {layer.get_seq_length() for layer in cache.layers} == {5}
    decode(model, tokens(model, 1), [1], cache)


@pytest.mark.parametrize("ratios", [None, {(0, 0): 0.25, (1, 0): 0.25}])
def test_each_layers_pairs_live_on_the_device_of_its_keys(ratios):
    # As accelerate splits a model over devices: here the second layer's tensors are on the device without memory.
    config = build("llama", num_hidden_layers=2).config
    cache = CompressedCache(config, CompressionSpec(keep_ratio=0.5, protect_last=1, head_ratios=ratios))
    for _ in range(3):
        for layer, device in enumerate(("cpu", "meta")):
            cache.layers[layer].update(*torch.randn(2, 1, 2, 5, 8, device=device))
            cache.layers[layer].unattended = False
            cache.layers[layer].evict_now()
            assert {part.keys.device.type for part in cache.layers[layer].parts()} == {device}
            assert {positions.device.type for positions in cache.layers[layer].positions()} == {device}
    assert cache.layers[0].held_by_head == cache.layers[1].held_by_head == ((8, 8) if ratios is None else (4, 8))


KEYS_ALONE = [name for name, policy in POLICIES.items() if not (policy.needs_attention or policy.needs_filters)]
SPECIAL = range(0, 160, 7)  # token ids


@pytest.mark.parametrize(
    "options", [{}, {"skip_layers": (0,), "protect_last": 5}, {"head_ratios": {(1, 1): 0.2}}], ids=str
)
@pytest.mark.parametrize("policy", KEYS_ALONE)
def test_a_cache_from_a_full_one_is_as_if_the_prompt_had_been_run_into_it(tiny, policy, options):
    needs = {"directions": (("low", "high"),) * 3} if policy == "signed_norm" else {}
    spec, ids = CompressionSpec(keep_ratio=0.4, policy=policy, **needs, **options), tokens(tiny, 40)
    full = DynamicCache(config=tiny.config)
    live = CompressedCache(tiny.config, spec, special_ids=SPECIAL)
    with torch.no_grad(), compressible(tiny):
        tiny(ids[:, :20], past_key_values=full)
        tiny(ids[:, :20], past_key_values=live)
        made = CompressedCache.from_full(full, tiny.config, spec, input_ids=ids[:, :20], special_ids=SPECIAL)
        before = [layer.keys.clone() for layer in full.layers]
        for step in range(20, 40):  # it goes on evicting, as the other does
            one, other = (tiny(ids[:, step : step + 1], past_key_values=cache).logits for cache in (made, live))
            torch.testing.assert_close(one, other)
            for layer in range(3):
                assert all(map(torch.equal, made.kept_positions(layer), live.kept_positions(layer)))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(full.layers, before, strict=True))


def test_a_cache_from_a_full_one_takes_windows_along_and_leaves_them():
    model = MistralForCausalLM(MistralConfig(**{**tiny_shape(), "sliding_window": 8})).eval()
    full, ids = DynamicCache(config=model.config), tokens(model, 40)
    with torch.no_grad(), compressible(model):
        model(ids[:, :30], past_key_values=full)
        made = CompressedCache.from_full(full, model.config, CompressionSpec(keep_ratio=1.0))
        one = model(ids[:, 30:], past_key_values=made).logits
    with torch.no_grad():
        torch.testing.assert_close(one, model(ids[:, 30:], past_key_values=full).logits)


@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(**TINY, layer_types=["conv", "full_attention", "conv"]),
        FalconH1Config(**TINY, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_chunk_size=4),
    ],
    ids=["beside layers of attention", "within them"],
)
def test_a_cache_from_a_full_one_takes_running_states_along_and_shares_none(config):
    torch.manual_seed(0)
    model, spec = AutoModelForCausalLM.from_config(config).eval(), CompressionSpec(keep_ratio=0.5)
    ids, full, live = tokens(model, 30), DynamicCache(config=config), CompressedCache(config, spec)
    with torch.no_grad(), compressible(model):
        model(ids[:, :20], past_key_values=full)
        model(ids[:, :20], past_key_values=live)
        made = [CompressedCache.from_full(full, config, spec) for _ in range(2)]
        for start, end in ((20, 21), (21, 22), (22, 30)):
            expected = model(ids[:, start:end], past_key_values=live).logits
            for cache in made:
                torch.testing.assert_close(model(ids[:, start:end], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("policy", ["accumulated", "window", "last_query"])
def test_a_policy_that_needs_queries_cannot_begin_with_a_full_cache(tiny, policy):
    with pytest.raises(ValueError, match="run the prompt into a CompressedCache"):
        CompressedCache.from_full(DynamicCache(config=tiny.config), tiny.config, CompressionSpec(policy=policy))
