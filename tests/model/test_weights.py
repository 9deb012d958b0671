"""Attention probabilities computed beside the model's own, held against float64 of the same queries and keys.

They are of the size of a real model's with biases on its keys: in a Qwen2.5 queries are -69 to 66 with a standard
deviation of 3.5, keys -166 to 175 with one of 26.8 (https://github.com/tenstorrent/tt-metal/issues/21199).
"""

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from analysis.models.load import LoadedModel
from analysis.recorder import capture
from l2kv import POLICIES, CompressedCache, CompressionSpec, compressible, probabilities
from l2kv.hooks import attention_hook
from l2kv.probabilities import attention_probabilities, hide_unseen
from tests.support.models import TINY, tokens
from tests.support.paths import BUNDLED
from tests.support.policies import rescored

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
MISPLACED = 1e-3  # at most, as a share of a query's attention
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


def biases(n: int, *, spread: float, peak: float) -> torch.Tensor:
    """[n]: most of the size of `spread`, and a few as large as `peak`."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)) * spread / 2
    values[::17] = torch.linspace(-peak, peak, len(values[::17]))
    return values


def vectors(dtype, batch=2, heads=6, kv_heads=2, queries=5, n=70, head_dim=64):
    """Queries [B, H, q, D] and keys [B, Hkv, n, D]: what differs between tokens is small beside the biases."""
    torch.manual_seed(0)
    query = biases(heads * head_dim, spread=3.5, peak=69).view(heads, 1, head_dim)
    key = biases(kv_heads * head_dim, spread=26.8, peak=170).view(kv_heads, 1, head_dim)
    query, key = query + torch.randn(batch, heads, queries, head_dim), key + torch.randn(batch, kv_heads, n, head_dim)
    return query.to(dtype), key.to(dtype)


def exactly(query, key, *, hidden=None, scaling=None, softcap=None, sinks=None):
    """The same in float64, head by head."""
    rows = []
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            of_head = key[row, head * key.shape[1] // query.shape[1]].double()
            scores = query[row, head].double() @ of_head.T * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
            top = scores.amax(-1, keepdim=True) if sinks is None else scores.amax(-1, keepdim=True).clamp(sinks[head])
            powers, to_sink = (scores - top).exp(), 0 if sinks is None else (sinks[head] - top).exp()
            rows.append(powers / (powers.sum(-1, keepdim=True) + to_sink))
    return torch.stack(rows).unflatten(0, query.shape[:2])


def misplaced(found, expected) -> float:
    """The largest share of a query's attention that is at other keys."""
    return (abs(found.double() - expected).sum(-1) / 2).max().item()


@pytest.mark.parametrize("window", [0, 1, 3, 9])
@pytest.mark.parametrize(("first", "queries", "keys"), [(0, 6, 6), (4, 3, 7), (2, 3, 9), (0, 1, 1)])
def test_a_query_sees_itself_and_what_is_before_it_within_its_window(first, queries, keys, window):
    scores = torch.zeros(2, 1, queries, keys)
    hide_unseen(scores, first, window)
    for i in range(queries):
        for key in range(keys):
            seen = key <= first + i and (window == 0 or key > first + i - window)
            assert (scores[..., i, key] == (0 if seen else -torch.inf)).all()


@pytest.mark.parametrize("held_at_a_time", [64, 3000, 10**9], ids=["key by key", "some keys", "all keys"])
@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": 0.11}, {"scaling": 0.2, "softcap": 50.0}, {"s_aux": torch.linspace(-2.0, 60.0, 6)}],
    ids=["plain", "scaled", "soft cap", "sinks"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_summed_in_float32_and_never_rounded_to_the_dtype_of_the_keys(
    dtype, options, held_at_a_time, monkeypatch
):
    monkeypatch.setattr(probabilities, "_CAST", held_at_a_time)
    query, key = vectors(dtype)
    hidden = torch.ones(5, 70, dtype=torch.bool).triu(66)
    found = attention_probabilities(query, key, lambda scores: scores.masked_fill_(hidden, -torch.inf), options)
    expected = exactly(
        query,
        key,
        hidden=hidden,
        scaling=options.get("scaling"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    assert found.dtype == torch.float32 and found.shape == (2, 6, 5, 70)
    assert misplaced(found, expected) < MISPLACED
    assert not found[..., hidden].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounded_products_would_be_far_off(dtype):
    """Else the test above could not tell."""
    query, key = vectors(dtype)
    rounded = query @ key.repeat_interleave(3, dim=1).transpose(-1, -2)
    off = misplaced((rounded.float() / 8).softmax(-1), exactly(query, key))
    assert off > (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_does_not_round_them_either(dtype):
    query, key = vectors(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_probabilities(query, key, lambda scores: None, {})
    assert found.dtype == torch.float32 and misplaced(found, exactly(query, key)) < MISPLACED


def test_a_cache_of_another_dtype_than_the_queries_is_read_all_the_same():
    query, key = vectors(torch.float32)[0], vectors(torch.bfloat16)[1]
    assert misplaced(attention_probabilities(query, key, lambda scores: None, {}), exactly(query, key)) < MISPLACED


def test_keys_are_cast_a_few_at_a_time(monkeypatch):
    """One decoded token must not copy a long cache."""
    monkeypatch.setattr(probabilities, "_CAST", 2 * 64 * 10)
    query, key = vectors(torch.bfloat16, batch=1, queries=1, n=1000)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention_probabilities(query, key, lambda scores: None, {})
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty_strided")
    assert 0 < largest <= 2 * 64 * 10 * 4


@pytest.fixture(scope="module")
def qwen():
    """A function: dtype -> a Qwen2 of 2 layers whose biases are those of a real one."""
    models = {}

    def get(dtype) -> Qwen2ForCausalLM:
        if dtype not in models:
            torch.manual_seed(0)
            shape = {"vocab_size": 4096, "hidden_size": 192, "head_dim": 32, "num_hidden_layers": 2}
            model = Qwen2ForCausalLM(Qwen2Config(**TINY | shape | {"initializer_range": 0.05})).eval()
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.q_proj.bias.copy_(biases(6 * 32, spread=3.5, peak=69))
                    layer.self_attn.k_proj.bias.copy_(biases(2 * 32, spread=26.8, peak=170))
            models[dtype] = model.to(dtype)
        return models[dtype]

    return get


def looked_at(model, run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The queries and keys of each attention call of `run()`."""
    found = []

    def look(inner, module, query, key, value, mask, **options):
        found.append((query, key))
        return inner(module, query, key, value, mask, **options)

    with attention_hook(model, look):
        run()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_capture_in_half_precision_is_of_the_queries_and_keys_that_the_model_had(qwen, dtype):
    model, runs = qwen(dtype), []
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained(BUNDLED), "qwen2")
    calls = looked_at(model, lambda: runs.append(capture(loaded, TEXT * 7)))
    (run,), n = runs, runs[0].n_tokens
    assert n > 150  # several blocks of queries
    causal = torch.ones(n, n, dtype=torch.bool).triu(1)
    for layer in range(2):
        whole, probe = exactly(*calls[layer], hidden=causal)[0], exactly(*calls[2 + layer])[0, :, 0]
        assert misplaced(torch.from_numpy(run.probe_attention[layer]), probe[:, :-1]) < MISPLACED
        for query, row in zip(run.recent_positions, run.recent_attention[:, layer], strict=True):
            assert misplaced(torch.from_numpy(row[:, :query]), whole[:, query, :query]) < MISPLACED
        received = whole.sum(1) / torch.arange(n, 0, -1)
        torch.testing.assert_close(
            torch.from_numpy(run.attention_received[layer]).double(), received, rtol=MISPLACED, atol=1e-6
        )


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.needs_attention])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_policy_is_given_the_attention_of_the_queries_and_keys_that_the_model_had(qwen, dtype, name):
    model, seen, policy = qwen(dtype), [], POLICIES[name]
    ids, cache = tokens(model, 90, batch=2), CompressedCache(model.config, CompressionSpec(policy=name))
    watched = rescored(name, lambda pairs: (seen.append(pairs), policy.score(pairs))[1])
    with watched, compressible(model), torch.no_grad():
        calls = looked_at(model, lambda: model(ids, past_key_values=cache))
    causal = torch.ones(90, 90, dtype=torch.bool).triu(1)
    assert len(seen) == len(calls) == 2
    for pairs, call in zip(seen, calls, strict=True):
        whole = exactly(*call, hidden=causal).unflatten(1, (2, 3))  # [B, Hkv, G, q, n]
        if policy.needs_received:
            torch.testing.assert_close(pairs.received.double(), whole.sum((2, 3)), rtol=MISPLACED, atol=1e-5)
        else:
            assert misplaced(pairs.last_rows, whole[:, :, :, -policy.needs_rows :]) < MISPLACED
