"""What a capture holds against `output_attentions=True`, and how it behaves when things go wrong."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.cache_utils import CacheLayerMixin

from analysis import (
    ModelError,
    OutOfMemoryError,
    TextError,
    capture,
    correlation,
    recorder,
    study_of,
    suggest_skip_layers,
)
from analysis.errors import SettingsError
from analysis.measures import TOLD, attention_lost, kept_tokens
from analysis.metrics import status
from analysis.models import memory as memory_module
from analysis.models.load import LoadedModel
from analysis.models.memory import BLOCK, MAX_BINS, capture_bytes
from analysis.words import human_bytes
from l2kv import POLICIES, CompressedCache, CompressionSpec, compressible
from l2kv.config import CacheShape, layer_kinds
from tests.support.architectures import ARCHITECTURES, WINDOW
from tests.support.models import MODELS, OTHERS, TINY, TOKENIZER_VOCABULARY, build
from tests.support.oracle import eager
from tests.support.paths import BUNDLED, STORIES
from tests.support.texts import TEXT


@pytest.fixture(scope="module")
def load(models):
    def get(name: str) -> LoadedModel:
        real = models(name) if name in ("stories260K", "books-5m") else None  # skips where it is not at hand
        tokenizer = AutoTokenizer.from_pretrained(STORIES if name == "stories260K" else BUNDLED)
        if name in OTHERS:
            model_class, config_class, changes = OTHERS[name]
            torch.manual_seed(0)
            config = config_class(**(TINY | TOKENIZER_VOCABULARY | changes))
            return LoadedModel(model_class(config).eval(), tokenizer, name)
        return LoadedModel(real or build(name, **TOKENIZER_VOCABULARY), tokenizer, name)

    return get


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
@pytest.mark.parametrize("repeats", [1, 6], ids=["one block", "several blocks"])
def test_a_capture_is_what_output_attentions_shows(load, name, repeats):
    loaded = load(name)
    run = capture(loaded, TEXT * repeats if name != "stories260K" else TEXT * min(repeats, 3))
    attention, probe = eager(loaded, torch.from_numpy(run.token_ids)[None])
    n = run.n_tokens
    assert (repeats == 1) == (n <= BLOCK)

    def sees(query: int, key: int, kind: str) -> bool:
        return key <= query and (kind == "full" or query - key < loaded.config.sliding_window)

    for layer, kind in enumerate(run.layer_kinds):
        visible = np.array([[sees(q, k, kind) for k in range(n)] for q in range(n)])
        received = attention[layer].sum(axis=1) / visible.sum(axis=0)
        np.testing.assert_allclose(run.attention_received[layer], received, atol=1e-5)
    np.testing.assert_allclose(run.probe_attention, probe[:, :, :-1], atol=1e-5)
    assert run.recent_attention.shape[0] == 16 and list(run.recent_positions) == list(range(n - 16, n))
    for query, row in zip(run.recent_positions, run.recent_attention, strict=True):
        np.testing.assert_allclose(row[..., :query], attention[:, :, query, :query], atol=1e-5)
        assert not row[..., query:].any()  # neither its own column nor what follows

    width = run.tokens_per_bin
    assert run.pooled_attention.shape[-1] == -(-n // width) <= MAX_BINS
    for layer, head in ((0, 0), (run.n_layers - 1, run.n_heads - 1)):
        for row, column in ((0, 0), (run.pooled_attention.shape[-1] - 1, 0), (9, 3), (9, 9), (3, 9)):
            tokens = attention[layer, head, row * width : (row + 1) * width, column * width : (column + 1) * width]
            share = tokens.sum(axis=1).mean()
            step = 2 * np.sqrt(share * run.pooled_scale[layer, head]) / 255 + 1e-4  # of 8 bits over a square root
            assert abs(run.pooled(layer, head)[row, column] - share) <= step


def test_as_many_last_queries_are_kept_as_asked_for_and_as_there_is_room_and_text_for(load, monkeypatch):
    loaded = load("llama")
    three, none = capture(loaded, TEXT, last_queries=3), capture(loaded, TEXT, last_queries=0)
    assert three.recent_attention.shape == (3, 3, 6, three.n_tokens)
    np.testing.assert_array_equal(three.recent_attention, capture(loaded, TEXT).recent_attention[-3:])
    assert none.recent_attention.shape == (0, 3, 6, none.n_tokens) and not none.recent_positions
    short = capture(loaded, "the old man", last_queries=100)
    assert list(short.recent_positions) == list(range(short.n_tokens))
    assert not short.recent_attention[0].any()  # nothing precedes the first query
    monkeypatch.setattr("analysis.recorder.RECENT_BYTES", 5 * 3 * 6 * three.n_tokens * 4 + 7)
    assert list(capture(loaded, TEXT).recent_positions) == list(range(three.n_tokens - 5, three.n_tokens))
    with pytest.raises(ValueError, match="got -1"):
        capture(loaded, TEXT, last_queries=-1)


def test_the_estimate_counts_the_last_queries_up_to_their_bound(load, monkeypatch):
    config = load("llama").config  # 3 layers, 6 heads

    def rows(n: int, w: int) -> int:
        whole, without = (capture_bytes(config, n, itemsize=4, last_queries=each) for each in (w, 0))
        return whole - without

    assert rows(100, 16) == 16 * 3 * 6 * 100 * 4 and rows(10**6, 16) == memory_module.RECENT_BYTES
    assert capture_bytes(config, 100, itemsize=4) == capture_bytes(config, 100, itemsize=4, last_queries=16)


@pytest.mark.parametrize("name", ["llama", "qwen3", "books-5m"])
def test_norms_are_those_of_the_keys_as_cached(load, name):
    loaded = load(name)
    run = capture(loaded, TEXT)
    with torch.no_grad():
        cache = loaded.model(torch.from_numpy(run.token_ids)[None], use_cache=True).past_key_values
    for layer in range(run.n_layers):
        for kind, tensor in (("key_norm", cache.layers[layer].keys), ("value_norm", cache.layers[layer].values)):
            norms = [[sum(x * x for x in pair) ** 0.5 for pair in head] for head in tensor[0].tolist()]
            np.testing.assert_allclose(getattr(run, kind)[layer], norms, rtol=1e-5)


@pytest.mark.parametrize("policy", TOLD)
@pytest.mark.parametrize("protect", [(0, 0), (2, 10)], ids=str)
def test_the_tokens_shown_as_kept_are_those_the_cache_keeps(load, policy, protect):
    loaded = load("books-5m")
    run = capture(loaded, TEXT)
    rows = [["low", "high"] * (run.n_kv_heads // 2)] * run.n_layers
    spec = CompressionSpec(
        0.4,
        policy=policy,
        directions=rows if policy == "signed_norm" else None,
        protect_first=protect[0],
        protect_last=protect[1],
        skip_layers=(2,),
    )
    cache = CompressedCache(loaded.config, spec)
    with compressible(loaded.model), torch.no_grad():
        loaded.model(torch.from_numpy(run.token_ids)[None], past_key_values=cache)
    lost = attention_lost(run, spec)
    for layer in range(1, run.n_layers):  # in layer 0 equal tokens have equal norms, and rounding decides
        for head in range(run.n_heads):
            kept = cache.kept_positions(layer)[run.kv_head(head)][0].tolist()
            assert np.flatnonzero(kept_tokens(run, layer, head, spec)).tolist() == kept
            row = run.probe_attention[layer, head].tolist()
            assert lost[layer, head] == pytest.approx(sum(a for i, a in enumerate(row) if i not in kept), abs=1e-6)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(TOLD)))
def test_what_a_run_does_not_tell_of_a_policy_is_refused(load, policy):
    run = capture(load("books-5m"), TEXT)
    with pytest.raises(SettingsError, match=f"no keys, so it does not tell what {policy} keeps"):
        attention_lost(run, CompressionSpec(policy=policy))


def test_running_out_of_memory_is_told_and_everything_is_given_back(load, monkeypatch):
    loaded = load("books-5m")
    mlp = loaded.model.model.layers[3].mlp
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match="shorter text"):
            patch.setattr(mlp, "forward", fail)
            capture(loaded, TEXT)
        assert loaded.model.config._attn_implementation == "sdpa"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(mlp, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("a bug")))
        capture(loaded, TEXT)
    assert capture(loaded, TEXT).n_layers == 6


def test_a_head_with_a_window_is_said_to_be_undefined_not_judged_by_what_it_cannot_see(load):
    run = capture(load("gemma 2, soft cap and hybrid"), TEXT)
    kinds = np.array(run.layer_kinds)
    assert run.windows == tuple(10 * (kinds == "sliding"))
    assert set(status(run)[kinds == "sliding"].ravel()) == {"sliding window"}
    assert np.isfinite(correlation(run)[kinds == "full"]).all()
    assert not set(suggest_skip_layers(study_of(run), threshold=0).layers) & set(np.flatnonzero(kinds == "sliding"))
    assert kept_tokens(run, int(np.flatnonzero(kinds == "sliding")[0]), 0, CompressionSpec(0.1)).all()


def test_layers_of_an_unknown_kind_are_refused(load):
    loaded = load("llama")
    loaded.model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(ModelError, match="chunked_attention"):
        capture(loaded, TEXT)


def test_progress_comes_per_layer_and_an_exception_in_it_cancels_cleanly(load):
    loaded, calls = load("books-5m"), []
    capture(loaded, TEXT, progress=lambda done, total, _: calls.append((done, total)))
    assert sorted(set(calls)) == [(i, 6) for i in range(7)] and calls == sorted(calls)
    calls.clear()
    capture(loaded, TEXT * 6, progress=lambda done, total, _: calls.append((done, total)))
    assert calls.count((3, 6)) > 3  # within a long layer there are signs of life, and so ways to cancel

    class Cancelled(BaseException):
        pass

    def cancel(done, total, what):
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        capture(loaded, TEXT, progress=cancel)
    assert loaded.model.config._attn_implementation == "sdpa"


def test_texts_that_cannot_be_run_are_refused_with_the_reason(load):
    loaded = load("books-5m")
    for text, reason in (
        ("", "empty"),
        (" \n", "empty"),
        ("a", "2 tokens; at least 4"),
        ("a\ud800b c d e", "U\\+D800"),
    ):
        with pytest.raises(TextError, match=reason):
            capture(loaded, text)
    limit = loaded.config.max_position_embeddings
    assert any(f"beyond the {limit}" in w for w in capture(loaded, " a" * limit).warnings)
    with pytest.raises(TextError, match=r"positions for 64.*Shorten it to 63"):
        capture(LoadedModel(gpt2_of_64(), loaded.tokenizer, "gpt2"), TEXT * 2)
    with pytest.raises(TextError, match="do not belong together"):
        capture(LoadedModel(build("llama"), loaded.tokenizer, "foreign"), TEXT)


def gpt2_of_64() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=4096, n_positions=64)).eval()


def test_damaged_weights_and_hidden_attention_are_refused(load):
    tokenizer, damaged = load("books-5m").tokenizer, build("llama", **TOKENIZER_VOCABULARY)
    damaged.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        capture(LoadedModel(damaged, tokenizer, "damaged"), TEXT)
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(ModelError, match="Falcon"):
        capture(LoadedModel(falcon.eval(), tokenizer, "falcon"), TEXT)


def test_a_text_that_would_not_fit_is_refused_with_the_length_that_would(load, monkeypatch):
    loaded = load("books-5m")
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 5 * 2**20)
    with pytest.raises(OutOfMemoryError, match=r"Shorten it to about (\d+) tokens") as caught:
        capture(loaded, TEXT * 20)
    fits = int(str(caught.value).split("about ")[-1].split(" ")[0])
    at = {n: capture_bytes(loaded.config, n, itemsize=4) <= 4 * 2**20 for n in (fits, fits + 1)}
    assert at == {fits: True, fits + 1: False}


def test_cache_bytes_are_those_of_the_tensors(load):
    loaded = load("books-5m")
    shape = CacheShape.of(loaded.config, itemsize=4)
    with torch.no_grad():
        cache = loaded.model(torch.arange(2, 102)[None], use_cache=True).past_key_values
    assert shape.nbytes(100) == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    # 6 layers, 4 kv heads of 32, K and V, 4 bytes; layer 0 whole, the others 250 of 500
    spec = CompressionSpec(keep_ratio=0.5, skip_layers=(0,))
    assert shape.nbytes(500, spec) == (500 + 5 * 250) * 4 * 32 * 2 * 4


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if not each.refused])
def test_layers_of_a_cache_that_keep_every_token_are_those_that_transformers_gives_no_window(name):
    architecture = ARCHITECTURES[name]
    model, n = architecture.model(), 3 * WINDOW
    config = model.config.get_text_config(decoder=True)
    shape, cache = CacheShape.of(config, itemsize=4), DynamicCache(config=model.config)
    keep = [isinstance(layer, CacheLayerMixin) and not layer.is_sliding for layer in cache.layers]
    assert shape.layers == tuple(i for i, keeps in enumerate(keep) if keeps)
    assert len(layer_kinds(config)) - len(shape.layers) == architecture.left
    with torch.no_grad():
        model(torch.arange(2, 2 + n)[None], past_key_values=cache)
    assert shape.nbytes(n) == sum(cache.layers[i].keys.nbytes + cache.layers[i].values.nbytes for i in shape.layers)


def test_layers_with_heads_of_different_numbers_are_refused(load):
    model, tokenizer = ARCHITECTURES["Gemma 4 (text)"].model(), load("llama").tokenizer
    model.resize_token_embeddings(4096)
    with pytest.raises(ModelError, match="different numbers of kv heads"):
        capture(LoadedModel(model, tokenizer, "gemma 4"), TEXT)


def test_bytes_are_said_in_binary_units():
    assert [human_bytes(n) for n in (0, 1023, 1536, 300 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "300 MiB",
        "3.0 TiB",
    ]


@pytest.mark.parametrize(
    "text", ["The sea looked at him. " * 90_000, "🙂" * 500_000, "a" * 2_000_000], ids=lambda t: t[:5]
)
def test_a_text_that_is_far_too_long_is_refused_before_it_is_tokenised(load, monkeypatch, text):
    monkeypatch.setattr(recorder, "tokenize", lambda *_: pytest.fail("it was tokenised"))
    with pytest.raises(TextError, match=r"about [\d,]+ tokens; .* has positions for 64. Shorten it to some \d+ char"):
        capture(LoadedModel(gpt2_of_64(), load("books-5m").tokenizer, "gpt2"), text)
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 2**28)
    with pytest.raises(OutOfMemoryError, match="Shorten it to about"):
        capture(load("books-5m"), text)
