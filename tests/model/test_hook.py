"""The attention hook: how models call their attention, and that they are restored afterwards."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    OPTForCausalLM,
)

from analysis import ModelError
from analysis.models.load import LoadedModel
from analysis.paper.vectors import attention_rows, head_vectors
from analysis.preview import stream
from l2kv import CompressedCache, CompressionSpec, UnsupportedModelError, compressible, l2_compress
from l2kv.hooks import attention_hook
from tests.support.causal_models import TEXT, compress, model_of, text_for, tokenizer
from tests.support.models import TINY, build, tokens

HALF = CompressionSpec(keep_ratio=0.5)
TEXT_PART = TINY | {"model_type": "llama", "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}


def llava(vision="clip_vision_model", **text):
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=TEXT_PART | text, vision_config=VISION | {"model_type": vision}, image_token_index=150
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def chosen(model):
    """The attention of every config in a model, by the module that reads it."""
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def looks_on(inner, module, *args, **kwargs):
    return inner(module, *args, **kwargs)


def test_attention_chosen_for_a_part_is_given_back_to_it():
    model = llava()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = chosen(model)
    assert {"eager", "sdpa"} <= set(before)
    with compressible(model), attention_hook(model, looks_on):
        assert chosen(model) != before
    assert chosen(model) == before
    with pytest.raises(ZeroDivisionError), compressible(model):
        raise ZeroDivisionError
    assert chosen(model) == before


def test_towers_keep_their_own_attention():
    model = llava()
    with compressible(model):
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        assert model.model.language_model.config._attn_implementation != "sdpa"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_models_of_one_config_are_given_back_in_any_order(order):
    first = build("llama")
    models = [first, *(type(first)(first.config).eval() for _ in range(2))]
    assert models[1].config is first.config
    before, registered = first.config._attn_implementation, set(AttentionInterface._global_mapping)
    handles = [compressible(model) for model in models]
    for done, index in enumerate(order):
        for waiting in order[done:]:
            model = models[waiting]
            with torch.no_grad():
                cache = CompressedCache(model.config, HALF)
                model(tokens(model, 20), past_key_values=cache)
            assert cache.held == (10, 10, 10)
        handles[index].restore()
    assert (first.config._attn_implementation, set(AttentionInterface._global_mapping)) == (before, registered)


def test_hooks_on_one_model_end_in_any_order_too(tiny):
    heard = []

    def hook(name):
        return attention_hook(tiny, lambda inner, *args, **kwargs: heard.append(name) or inner(*args, **kwargs))

    before = chosen(tiny)
    one, two = hook("one"), hook("two")
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    with torch.no_grad():
        tiny(tokens(tiny, 5))
    assert heard == ["two"] * 3
    two.__exit__(None, None, None)
    assert chosen(tiny) == before


def test_a_model_that_is_not_prepared_is_told_so_though_another_of_its_config_is(tiny):
    other = type(tiny)(tiny.config).eval()
    with compressible(tiny), pytest.raises(RuntimeError, match="Prepare the model first"):
        other(tokens(other, 5), past_key_values=CompressedCache(other.config, HALF))


@pytest.mark.parametrize(
    "made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_prepared_model_is_a_model_that_is_not_prepared(made):
    model = build("llama")
    ids, before = tokens(model, 20), chosen(model)
    with compressible(model):
        copied = made(model)
        assert chosen(copied) == before
        with pytest.raises(RuntimeError, match="Prepare the model first"):
            copied(ids, past_key_values=CompressedCache(copied.config, HALF))
        with compressible(copied), torch.no_grad():
            caches = [CompressedCache(model.config, HALF) for _ in range(2)]
            logits = [m(ids, past_key_values=cache).logits for m, cache in zip((model, copied), caches, strict=True)]
            assert torch.equal(*logits) and caches[1].held == (10, 10, 10)
    with torch.no_grad():
        torch.testing.assert_close(copied(ids).logits, model(ids).logits)


def test_another_attention_chosen_for_a_prepared_model_is_told_and_not_taken_for_its_kind():
    model = build("llama")
    with compressible(model):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="Choose it first"):
            model(tokens(model, 5), past_key_values=CompressedCache(model.config, HALF))
    assert model.config._attn_implementation == "sdpa"


def test_what_a_forward_pass_begins_with_does_not_matter():
    """OPT's passes go by its `base_model`."""
    torch.manual_seed(0)
    shape = {"vocab_size": 160, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = OPTConfig(**shape, word_embed_proj_dim=48, max_position_embeddings=128, init_std=0.2, pad_token_id=1)
    model = OPTForCausalLM(config).eval()
    ids = tokens(model, 20)
    for part in (model, model.model, model.model.decoder):
        cache = CompressedCache(config, HALF)
        with compressible(model), torch.no_grad():
            part(ids, past_key_values=cache, use_cache=True)
            part(ids[:, :1], past_key_values=cache, use_cache=True)
        assert cache.held == (11, 11, 11)


class Wrapper(nn.Module):
    """As PEFT wraps a model: no model of transformers itself, it hands on what it does not know."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_a_wrapped_model_is_prepared(tiny):
    wrapped, ids = Wrapper(tiny), tokens(tiny, 20)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    before = chosen(tiny)
    with compressible(wrapped):
        cache, other = CompressedCache(tiny.config, HALF), CompressedCache(tiny.config, HALF)
        generated = wrapped.generate(input_ids=ids, past_key_values=cache, **settings)
        assert cache.held == (12, 12, 12)
        with torch.no_grad():
            wrapped(input_ids=ids, past_key_values=other)
        assert other.held == (10, 10, 10)
    assert chosen(tiny) == before
    with compressible(tiny):
        cache = CompressedCache(tiny.config, HALF)
        assert torch.equal(tiny.generate(input_ids=ids, past_key_values=cache, **settings), generated)


def test_a_model_within_a_prepared_one_may_be_prepared_as_well(tiny):
    ids = tokens(tiny, 20)
    for outer, inner in ((tiny, tiny.model), (tiny.model, tiny)):
        with compressible(outer), compressible(inner), torch.no_grad():
            cache, expected = CompressedCache(tiny.config, HALF), CompressedCache(tiny.config, HALF)
            tiny(ids, past_key_values=cache)
            tiny.model(ids, past_key_values=expected)
        assert cache.held == expected.held == (10, 10, 10)


def test_a_mask_given_by_name_or_in_its_place_is_the_same(tiny):
    seen = []

    def look(inner, module, query, key, value, mask, **kwargs):
        seen.append(mask)
        return inner(module, query, key, value, mask, **kwargs)

    attention = tiny.model.layers[0].self_attn
    with attention_hook(tiny, look):
        function = AttentionInterface._global_mapping[tiny.config._attn_implementation]
        query, key = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 4, 8)
        mask = torch.ones(4, 4).tril().bool()[None, None]
        one, _ = function(attention, query, key, key, mask, scaling=1.0)
        two, _ = function(attention, query, key, key, attention_mask=mask, scaling=1.0)
        three, _ = function(attention, query=query, key=key, value=key, attention_mask=mask, scaling=1.0)
    assert torch.equal(one, two) and torch.equal(one, three) and all(given is mask for given in seen)


@pytest.mark.parametrize("model_type,why", [("diffllama", "other keys or values"), ("doge", "mask hides more")])
def test_what_attention_is_given_is_compared_with_what_the_cache_holds(model_type, why):
    model = model_of(model_type)
    with pytest.raises(UnsupportedModelError, match=why):
        compress(model, text_for(20), HALF, (20,))


def test_attention_to_what_was_given_before_is_refused():
    cache = CompressedCache(build("llama").config, HALF)
    cache.serving = True
    given = cache.update(*torch.randn(2, 1, 2, 5, 8), 0)
    assert cache.take(*given).layer_idx == 0
    with pytest.raises(UnsupportedModelError, match="several times"):
        cache.take(*given)
    assert cache.take(*torch.randn(2, 1, 2, 5, 8)) is None  # a tower's


def test_keys_repeated_in_turn_are_told_from_keys_repeated_side_by_side():
    for in_turn in (False, True):
        cache = CompressedCache(build("llama").config, HALF)
        cache.serving = True
        given = cache.update(*torch.randn(2, 1, 2, 5, 8), 0)
        key, value = (x.repeat(1, 3, 1, 1) if in_turn else x.repeat_interleave(3, dim=1) for x in given)
        assert cache.take(key, value).repeats == (3, in_turn)


@pytest.mark.parametrize("shares", [None, {(0, 0): 0.25, (1, 1): 0.25}], ids=["alike", "ragged"])
@pytest.mark.parametrize("order", [(True, False, False, True), (False, True, False, True)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_read_under_autocast_is_gone_on_with_outside_of_it_as_with_a_plain_cache(attention, order, shares):
    model = build("llama", attn_implementation=attention)
    ids = tokens(model, 16)

    def logits(cache):
        given = []
        for chunk, half in zip(ids.split([10, 1, 4, 1], dim=1), order, strict=True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                given.append(model(chunk, past_key_values=cache).logits.float())
        return torch.cat(given, dim=1)

    with compressible(model):
        whole = logits(CompressedCache(model.config, CompressionSpec(keep_ratio=1.0)))
        torch.testing.assert_close(whole, logits(DynamicCache(config=model.config)), atol=1e-4, rtol=0)
        cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5, head_ratios=shares))
        assert logits(cache).isfinite().all() and max(cache.held) == 8


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next", "falcon_h1", "zamba2"])
def test_running_states_are_transformers_own_and_are_not_shared_by_what_is_compressed_once(model_type):
    model = model_of(model_type)
    ids = text_for(24)
    with torch.no_grad(), compressible(model):
        plain = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=plain)
        once = l2_compress(plain, keep_ratio=0.5)
        expected = model(ids[:, 20:21], past_key_values=copy.deepcopy(once)).logits
        model(ids[:, 21:], past_key_values=plain)  # goes on, and writes into its states
        torch.testing.assert_close(model(ids[:, 20:21], past_key_values=once).logits, expected)
        cache = CompressedCache(model.config, HALF)
        model(ids[:, :20], past_key_values=cache)
        torch.testing.assert_close(model(ids[:, 20:21], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("model_type", ["lfm2", "falcon_h1", "gemma3n_text"])
def test_hybrids_generate_with_beams_and_can_be_reset(model_type):
    model = model_of(model_type)
    ids, beams = text_for(12), {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    cache = CompressedCache(model.config, CompressionSpec(keep_ratio=1.0))
    with compressible(model):
        whole = model.generate(input_ids=ids, **beams)
        assert torch.equal(model.generate(input_ids=ids, past_key_values=cache, **beams), whole)
        with torch.no_grad():
            cache.reset()
            fresh = CompressedCache(model.config, CompressionSpec(keep_ratio=1.0))
            logits = [model(ids, past_key_values=each).logits for each in (cache, fresh)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("last", [0, 1])
def test_a_model_built_of_a_prepared_ones_config_disturbs_nobody(last):
    first = build("llama")
    ids, handles = tokens(first, 20), [compressible(first)]
    second = type(first)(first.config).eval()
    copied = AutoModelForCausalLM.from_config(LlamaConfig(**first.config.to_dict())).eval()
    assert copied.config._attn_implementation == "sdpa"
    handles.append(compressible(second))
    for model in (first, second):
        cache = CompressedCache(model.config, HALF)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert cache.held == (10, 10, 10)
    handles[1 - last].restore()
    handles[last].restore()
    assert first.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["opt", "lfm2", "falcon_h1", "gemma3n_text", "hrm_text"])
def test_text_is_streamed_from_models_of_every_kind(model_type):
    loaded = LoadedModel(model_of(model_type), tokenizer(), model_type)
    whole, kept, half = list(stream(loaded, TEXT, [None, CompressionSpec(keep_ratio=1.0), HALF], max_new_tokens=3))[-1]
    assert whole.token_ids == kept.token_ids and whole.held == kept.held and whole.nbytes == kept.nbytes
    assert half.nbytes < whole.nbytes


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "opt", "afmoe", "gpt_oss", "gemma3n_text"])
def test_vectors_are_those_of_the_models_own_attention(model_type):
    model = model_of(model_type)
    model.set_attn_implementation("eager")
    loaded = LoadedModel(model, tokenizer(), model_type)
    for layer in range(4):
        vectors = head_vectors(loaded, TEXT, layer)
        ids = torch.tensor(tokenizer()(TEXT)["input_ids"])[None]
        with torch.no_grad():
            shown = model(ids, output_attentions=True, use_cache=False).attentions[layer][0]
        rows = torch.from_numpy(next(attention_rows(vectors, 1)))
        torch.testing.assert_close(rows, shown[1][..., : rows.shape[-1]], atol=1e-4, rtol=0)


def test_vectors_of_a_model_that_masks_otherwise_are_refused():
    with pytest.raises(ModelError, match="hides more than the future and a window"):
        head_vectors(LoadedModel(model_of("doge"), tokenizer(), "doge"), TEXT, 0)


PADDED = ["lfm2", "falcon_h1", "qwen3_next", "gemma3n_text", "jetmoe", "gpt_oss", "afmoe"]


@pytest.mark.parametrize("eager", [False, True], ids=["own", "eager"])
@pytest.mark.parametrize("model_type", PADDED)
def test_rows_padded_on_the_left_are_as_with_a_plain_cache(model_type, eager):
    model = model_of(model_type)
    if eager:
        model.set_attn_implementation("eager")
    ids, mask = text_for(20).repeat(2, 1), torch.ones(2, 22, dtype=torch.long)
    mask[1, :4] = 0

    def logits(cache):
        with torch.no_grad():
            parts = [model(ids, attention_mask=mask[:, :20], past_key_values=cache)]
            for t in (21, 22):
                parts.append(model(ids[:, t - 20 : t - 19], attention_mask=mask[:, :t], past_key_values=cache))
        row, padded = torch.cat([part.logits for part in parts], dim=1)
        return torch.cat([row, padded[4:]])

    with compressible(model):
        expected = logits(DynamicCache(config=model.config))
        given = logits(CompressedCache(model.config, CompressionSpec(keep_ratio=1.0)))
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
        cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5, head_ratios={(1, 0): 0.2}))
        assert logits(cache).isfinite().all() and max(cache.held) == 11


def test_a_prepared_model_that_is_dropped_goes_with_its_hooks():
    """As in a notebook that prepares one model after the other, and restores none."""
    model = build("llama")
    compressible(model)  # by whose hooks all is held
    gc.collect()
    ids, config, before = tokens(model, 20), model.config, set(AttentionInterface._global_mapping)
    cache = CompressedCache(config, CompressionSpec(keep_ratio=0.5))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert max(cache.held) == 10
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and config._attn_implementation == "sdpa"
    assert set(AttentionInterface._global_mapping) < before  # its name is free again
