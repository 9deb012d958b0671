"""The lab: agreement of any scores with attention against slow loops, the Pareto front by hand, and the command."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from transformers import DynamicCache

from analysis import SettingsError, TextError, evaluate, on_front, studies_by_policy
from analysis.evaluation.lm import LmSettings
from analysis.evaluation.log import Log
from analysis.lab import OTHERS, methods
from analysis.studies import layer_means
from analysis.texts.tokens import tokenize
from app.cli import main
from l2kv import CompressedCache, CompressionSpec, load_policy
from tests.support.decoding import IN_CHUNKS, decode, kept_sets
from tests.support.evaluation import of_changes
from tests.support.losses import expected_losses
from tests.support.models import tokens
from tests.support.oracle import eager, masked_forward
from tests.support.policies import forget_files

TEXT = "The old man looked at the sea, and the sea looked at the old man, who had nothing to say to it. " * 3
MY = '''"""Scores of my own."""


def score(keys, values, positions):
    """Keep large values under small keys, and late ones."""
    return values.norm(dim=-1) - 2 * keys.norm(dim=-1) + 0.01 * positions


def low(keys, values, positions):
    """Keep small keys."""
    return -keys.norm(dim=-1)
'''


@pytest.fixture
def my(tmp_path) -> Iterator[str]:
    """The path of a file of scores; its policies are forgotten afterwards."""
    (tmp_path / "my.py").write_text(MY)
    with forget_files():
        yield str(tmp_path / "my.py")


@pytest.fixture(scope="module")
def attention_and_pairs(loaded):
    """Attention [L, H, T] of the next token, and keys and values [L, Hkv, T, D], by transformers itself."""
    ids = torch.from_numpy(tokenize(loaded.tokenizer, TEXT).ids)[None]
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded.model(ids, past_key_values=cache)
    pairs = [torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values")]
    return eager(loaded, ids)[1][..., :-1].astype(np.float64), *pairs


def test_agreement_is_that_of_the_order_of_scores_worked_out_head_by_head(loaded, my, attention_and_pairs):
    attention, keys, values = attention_and_pairs
    name = load_policy(f"{my}:score")
    study = studies_by_policy(loaded, [("a text", TEXT)], [name, "low_norm"])[name]
    scores = (values.norm(dim=-1) - 2 * keys.norm(dim=-1) + 0.01 * torch.arange(keys.shape[2])).double().numpy()
    layers, heads, n = attention.shape
    for layer, head in np.ndindex(layers, heads):
        given, order = attention[layer, head], -scores[layer, head * scores.shape[1] // heads]
        covariances = [np.cov(given, rankdata(by))[0, 1] for by in (order, given)]
        lost, ideal = (
            expected_losses(given.tolist(), order.tolist()),
            expected_losses(given.tolist(), (-given).tolist()),
        )
        assert study.of("gamma")[0, layer, head] == pytest.approx(covariances[0] / covariances[1], abs=1e-4)
        assert study.of("alr_per_token")[0, layer, head] == pytest.approx((sum(lost) - sum(ideal)) / n, abs=1e-4)


def test_a_file_that_scores_by_low_norm_agrees_as_low_norm_does(loaded, my):
    name = load_policy(f"{my}:low")
    found = studies_by_policy(
        loaded, [("a", TEXT), ("b", TEXT[100:])], [name, "low_norm", "random"], probe="all queries"
    )
    by_layer = {policy: layer_means(study, probe="all queries").mean for policy, study in found.items()}
    # All but layer 0, whose equal tokens a norm ties, and a file's score tells apart by rounding.
    np.testing.assert_allclose(by_layer[name][1:], by_layer["low_norm"][1:], atol=1e-3)
    assert abs(by_layer["random"]).max() < 0.35 and found[name].documents == ("a", "b")


@pytest.mark.parametrize("policy", ["window", "q_filters", "fastgen"])
def test_what_needs_more_than_pairs_has_no_agreement(loaded, policy):
    with pytest.raises(SettingsError, match=f"The order of {policy} depends on more than keys and values"):
        studies_by_policy(loaded, [("a text", TEXT)], ["low_norm", policy])


def test_without_a_text_there_is_no_agreement(loaded):
    with pytest.raises(TextError, match="no texts"):
        studies_by_policy(loaded, [], ["low_norm"])


@pytest.mark.parametrize("ratios", [{}, {"head_ratios": {(1, 0): 0.8, (1, 1): 0.3}}], ids=["even", "ragged"])
def test_it_decodes_as_a_full_forward_pass_that_masks_what_it_evicts(tiny, my, ratios):
    spec = CompressionSpec(keep_ratio=0.5, protect_last=3, policy=load_policy(f"{my}:low"), **ratios)
    ids, chunks = tokens(tiny, sum(IN_CHUNKS)), IN_CHUNKS
    cache = CompressedCache(tiny.config, spec)
    expected, kept = masked_forward(tiny, ids, chunks, spec, scores=lambda layer, keys: -keys.norm(dim=-1))
    assert torch.allclose(decode(tiny, ids, chunks, cache), expected, atol=1e-4) and kept_sets(cache) == kept


def test_methods_are_the_full_cache_and_each_policy_at_each_ratio():
    assert methods(["random"], [0.5, 0.25], protect_last=8) == {
        "full cache": None,
        "random 0.5": CompressionSpec(keep_ratio=0.5, policy="random", protect_last=8),
        "random 0.25": CompressionSpec(keep_ratio=0.25, policy="random", protect_last=8),
    }


def test_the_front_is_what_nothing_beats_in_bytes_and_score():
    nbytes = {"full cache": 100, "good": 50, "equal": 50, "bad": 50, "small": 25, "worse": 60, "undefined": 10}
    changes = {"good": [0.1, 0.3], "equal": [0.3, 0.1], "bad": [0.2, 0.3], "small": [0.9, 0.9], "worse": [0.2, 0.4]}
    changes["undefined"] = [None, 0.0]
    specs = {name: CompressionSpec(budget=i) for i, name in enumerate(changes)}
    results = of_changes("a model", specs, changes, samples=("a", "b"), nbytes=nbytes)
    assert on_front(results) == ("full cache", "good", "equal", "small")


def test_the_command_tells_agreement_prediction_and_passkeys(my, tmp_path, capsys, monkeypatch):
    arguments = ["lab", f"{my}:score", "-m", "books-5m", "--keep-ratios", "0.5", "-o", str(tmp_path / "results")]
    monkeypatch.setattr("analysis.lab.PREDICTION", LmSettings(96, 4))
    assert main(arguments) == 0
    told = capsys.readouterr().out
    name = load_policy(f"{my}:score")
    assert [line for line in told.splitlines() if line.startswith(f"{name} 0.5")] and f"Γ {name}" in told
    assert told.index("agreement of scores") < told.index("Prediction, nats/token") < told.index("Passkey, share found")
    computed = []
    monkeypatch.setattr(Log, "_append", lambda log, row: computed.append(row.method))
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not computed and said["policy"] == name and len(said["agreement"]) == 6
    assert [row["method"] for row in said["lm"]] == ["full cache", *(f"{policy} 0.5" for policy in (name, *OTHERS))]
    assert {row["front"] for row in said["lm"]} == {"yes", ""}


def test_a_changed_file_is_not_resumed_as_the_one_before(loaded, my, tmp_path, monkeypatch):
    file, texts, settings = tmp_path / "rows.jsonl", [("a text", TEXT)], LmSettings(24, 4)
    computed = []
    append = Log._append
    monkeypatch.setattr(Log, "_append", lambda log, row: (computed.append(row.method), append(log, row)))

    def run() -> str:
        name = load_policy(f"{my}:score")
        evaluate(loaded, "lm", methods([name, "random"], [0.5]), texts=texts, settings=settings, out=file)
        return f"{name} 0.5"

    with forget_files():  # as in another process: the file of results names a policy that is not loaded
        first = run()
    (tmp_path / "my.py").write_text(MY.replace("0.01", "0.02"))
    second = run()
    assert second != first and sorted(computed) == sorted([first, "random 0.5", "full cache", second])
    assert run() == second and len(computed) == 4
