"""The paper's figures: vectors against `output_attentions`, numbers against slow loops, records and pages."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

from analysis import ModelError, TextError, capture, load_model
from analysis.errors import SettingsError
from analysis.metrics import correlation
from analysis.models.load import LoadedModel
from analysis.paper import experiments
from analysis.paper.figures import FIGURES, VERSION, best_and_worst, four_heads, over_chunks, reproduce, to_json
from analysis.paper.vectors import attention_rows, each_layer, head_vectors, pooled_attention
from analysis.paper.why import Factors, channels, factors, sink_head, sink_key, zeroing
from app import figures
from app.report import paper
from app.report.writing import document
from tests.support.losses import slow_losses
from tests.support.models import OTHERS, TINY, TOKENIZER_VOCABULARY, build
from tests.support.oracle import eager
from tests.support.paths import BUNDLED
from tests.support.runs import made_up, random_run, run_of
from tests.support.texts import TEXT


@pytest.fixture(scope="module")
def load():
    tokenizer, made = AutoTokenizer.from_pretrained(BUNDLED), {}

    def get(name: str) -> LoadedModel:
        if name not in made:
            if name in OTHERS:
                model_class, config_class, changes = OTHERS[name]
                torch.manual_seed(0)
                model = model_class(config_class(**(TINY | TOKENIZER_VOCABULARY | changes))).eval()
            else:
                model = build(name, **TOKENIZER_VOCABULARY)
            made[name] = LoadedModel(model, tokenizer, name)
        return made[name]

    return get


def slow_row(query, keys, scaling) -> list[float]:
    """softmax of the products, number by number."""
    logits = [scaling * sum(float(a) * float(b) for a, b in zip(query, key, strict=True)) for key in keys]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def moved(row, other) -> float:
    return sum(abs(a - b) for a, b in zip(row, other, strict=True)) / 2


# vectors


@pytest.mark.parametrize("name", ["llama", "qwen3", *OTHERS])
@pytest.mark.parametrize("repeats", [1, 4], ids=["one block", "several blocks"])
def test_the_attention_of_vectors_is_what_output_attentions_shows(load, name, repeats):
    loaded, text = load(name), TEXT * repeats
    run = capture(loaded, text)
    attention, _ = eager(loaded, torch.from_numpy(run.token_ids)[None])
    layers = []
    each_layer(loaded, text, layers.append)
    assert [vectors.layer for vectors in layers] == list(range(run.n_layers))
    for vectors in layers:
        assert vectors.window == run.windows[vectors.layer]
        np.testing.assert_allclose(np.linalg.norm(vectors.keys, axis=-1), run.key_norm[vectors.layer], rtol=1e-5)
        for head in (0, run.n_heads - 1):
            rows = np.concatenate(list(attention_rows(vectors, head, block=100)))
            np.testing.assert_allclose(rows, attention[vectors.layer, head], atol=1e-5)
    pooled, width = pooled_attention(vectors, head)
    assert width == run.tokens_per_bin
    step = 2 * np.sqrt(pooled * run.pooled_scale[-1, -1]) / 255 + 1e-4  # of 8 bits over a square root
    assert (abs(pooled - run.pooled(run.n_layers - 1, head)) <= step).all()


def test_one_layer_can_be_asked_for_and_progress_told_and_cancelled(load):
    loaded, calls, layers = load("llama"), [], []
    one = head_vectors(loaded, TEXT, 1, progress=lambda *call: calls.append(call))
    each_layer(loaded, TEXT, layers.append)
    np.testing.assert_array_equal(one.keys, layers[1].keys)
    assert one.layer == 1 and calls == [(1, 3, "layers"), (2, 3, "layers"), (3, 3, "layers")]

    def cancel(done, total, what):
        raise KeyboardInterrupt

    before = loaded.model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt):
        head_vectors(loaded, TEXT, 1, progress=cancel)
    assert loaded.model.config._attn_implementation == before


def test_what_a_capture_refuses_is_refused(load):
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        head_vectors(load("llama"), TEXT, 3)
    with pytest.raises(TextError, match="at least"):
        head_vectors(load("llama"), "no", 0)
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=4096, hidden_size=48, num_hidden_layers=1, num_attention_heads=6)
    )
    with pytest.raises(ModelError):
        head_vectors(LoadedModel(falcon.eval(), load("llama").tokenizer, "falcon"), TEXT, 0)
    broken = LoadedModel(build("llama", **TOKENIZER_VOCABULARY), load("llama").tokenizer, "broken")
    torch.nn.init.constant_(broken.model.model.layers[1].mlp.up_proj.weight, math.nan)
    with pytest.raises(ModelError, match="NaN"):
        head_vectors(broken, TEXT, 0)


# figures 1, 2 and 7


def test_the_four_heads_are_the_extremes_and_the_nearest_to_the_thirds():
    run = random_run()
    gamma = correlation(run)
    chosen = four_heads(run)
    ordered = sorted(gamma.ravel())
    assert chosen.gamma[0] == ordered[0] and chosen.gamma[3] == ordered[-1]
    for value, third in zip(chosen.gamma[1:3], (1 / 3, 2 / 3), strict=True):
        place = third * (len(ordered) - 1)
        aim = ordered[int(place)] + (place % 1) * (ordered[int(place) + 1] - ordered[int(place)])
        assert abs(value - aim) == min(abs(other - aim) for other in ordered)
    layer, head = chosen.heads[2]
    np.testing.assert_array_equal(chosen.key_norm[2], run.key_norm[layer, head // 3])
    np.testing.assert_array_equal(chosen.attention[2], run.attention_received[layer, head])


def test_other_heads_can_be_chosen_and_must_be_there():
    run = random_run()
    assert four_heads(run, [(2, 5)]).gamma == correlation(run)[2, 5]
    with pytest.raises(ValueError, match="3 layers of 6 heads"):
        four_heads(run, [(3, 0)])
    with pytest.raises(TextError, match="No head of this model is defined"):
        four_heads(run_of(np.ones((1, 1, 9)), np.ones((1, 1, 9)) / 9))


def test_the_curves_of_figure_7_are_the_means_of_what_norm_order_loses_beyond_the_ideal():
    runs = [random_run(0, n=30), random_run(1, n=30)]
    over = over_chunks(iter(runs), points=30)
    sums = np.zeros((3, 6))
    for layer in range(3):
        for head in range(6):
            excess = np.zeros(31)
            for run in runs:
                by_norm, _, ideal = slow_losses(run, layer, head, 0)
                excess += np.subtract(by_norm, ideal) / 2
            np.testing.assert_allclose(over.excess[layer, head], excess, atol=1e-6)
            sums[layer, head] = sum(excess)
    np.testing.assert_allclose(over.alr, sums, atol=1e-5)
    np.testing.assert_allclose(over.alr_per_token, sums / 30, atol=1e-6)
    gammas = np.mean([correlation(run) for run in runs], axis=0)
    np.testing.assert_allclose(over.normalised_alr, 1 + gammas, atol=1e-6)

    two = best_and_worst(over)
    assert [sums[head] for head in two.heads] == [sums.min(), sums.max()]
    np.testing.assert_allclose(two.most, [max(over.excess[head]) for head in two.heads])


def test_a_head_is_averaged_over_the_chunks_that_define_it():
    run = random_run()
    constant = run.key_norm.copy()
    constant[0] = 1.0
    over = over_chunks([run, replace(run, key_norm=constant)])
    assert (over.defined[0] == 1).all() and (over.defined[1:] == 2).all()
    np.testing.assert_allclose(over.alr[0], over_chunks([run]).alr[0])
    nowhere = over_chunks([replace(run, key_norm=constant)])
    assert np.isnan(nowhere.alr[0]).all() and np.isfinite(best_and_worst(nowhere).alr).all()


# figures 8 and 9


def test_a_sink_is_looked_for_where_the_first_key_is_the_shortest():
    norm, probe = np.full((1, 2, 8), 2.0) + np.arange(8) / 10, np.full((1, 4, 8), 0.05)
    norm[0, 0, 0], norm[0, 1, 0] = 1.0, 5.0  # the first key is the shortest in kv head 0 alone
    probe[0, :, 0] = [0.3, 0.4, 0.2, 0.6]
    found = sink_head(run_of(norm, probe))
    assert (found.layer, found.head, found.low_norm) == (0, 1, True) and found.share == pytest.approx(0.4 / 0.75)
    norm[0, 0, 0] = 5.0
    found = sink_head(run_of(norm, probe))
    assert (found.head, found.low_norm) == (3, False) and "no head of this model" in str(found)


def test_peaks_are_the_dimensions_that_set_the_first_key_apart_and_carry_its_logits():
    vectors = made_up()
    vectors.keys[0, 0, [2, 5]] += [30, -20]
    key = sink_key(vectors, 1, n_peaks=2)
    assert key.peaks == (2, 5)
    keys = vectors.keys[0].astype(float)
    logits, of_peaks, leads = [], [], []
    for query in vectors.queries[1, 1:].astype(float):
        parts = [0.4 * query[d] * keys[0, d] for d in range(8)]
        others = [0.4 * sum(query[d] * other[d] for d in range(8)) for other in keys[1:]]
        logits.append(sum(parts))
        of_peaks.append(parts[2] + parts[5])
        leads.append(sum(parts) - sum(others) / len(others))
    for got, wanted in ((key.logit, logits), (key.logit_of_peaks, of_peaks), (key.lead, leads)):
        assert got == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    with pytest.raises(ValueError, match="1 to 7, got 8"):
        sink_key(vectors, 0, n_peaks=8)


def test_zeroing_is_a_plain_loop_over_queries_and_draws():
    vectors = made_up(n=9)
    found = zeroing(vectors, 3, (1, 6), draws=5, seed=7)
    assert len(found.random) == 5 and len({each.dimensions for each in found.random}) > 1
    assert all(len(set(each.dimensions) - {1, 6}) == 2 for each in found.random)  # a control without the peaks
    for tried in (found.as_it_is, found.peaked, *found.random):
        keys = vectors.keys[1].copy()
        for d in tried.dimensions:
            keys[:, d] = 0
        shares, distances = [], []
        for i in range(1, 9):
            before, after = (slow_row(vectors.queries[3, i], k[: i + 1], 0.4) for k in (vectors.keys[1], keys))
            shares.append(after[0])
            distances.append(moved(before, after))
        assert tried.sink_share == pytest.approx(sum(shares) / 8, abs=1e-6)
        assert tried.distance == pytest.approx(sum(distances) / 8, abs=1e-6)
    assert found.as_it_is.distance == 0 and found.peaked.distance > 0
    mean, low, high = found.of_random("distance")
    values = sorted(each.distance for each in found.random)
    assert values[0] <= low <= mean <= high <= values[-1] and mean == pytest.approx(sum(values) / 5)
    assert zeroing(vectors, 3, (1, 6), draws=5, seed=7).random == found.random
    np.testing.assert_allclose(
        found.map_peaked[8], slow_row(vectors.queries[3, 8], _zeroed(vectors, (1, 6)), 0.4), 1e-4
    )


def test_the_random_dimensions_are_all_of_those_that_are_no_peaks():
    found = zeroing(made_up(n=5), 0, (1, 6), draws=60)
    assert {d for each in found.random for d in each.dimensions} == {0, 2, 3, 4, 5, 7}
    half = zeroing(made_up(n=5), 0, (0, 1, 2, 3), draws=2)
    assert {each.dimensions for each in half.random} == {(4, 5, 6, 7)}
    with pytest.raises(ValueError, match="half of the 8 dimensions at most, got 5"):
        zeroing(made_up(n=5), 0, (0, 1, 2, 3, 4))


def _zeroed(vectors, dimensions):
    keys = vectors.keys[1].copy()
    keys[:, list(dimensions)] = 0
    return keys


# factors


def test_channels_are_shares_of_the_logits_and_of_the_keys():
    vectors = made_up(n=9)
    found = channels(vectors, 3)
    parts = [np.outer(vectors.queries[3][:, d], vectors.keys_of(3)[:, d]) for d in range(8)]  # of all logits
    norms = [math.sqrt(sum(x * x for x in part.ravel().tolist())) for part in parts]
    np.testing.assert_allclose(found.magnitude, np.array(norms) / sum(norms), rtol=1e-5)
    keys = vectors.keys_of(3).astype(float)
    eigenvalues = np.sort(np.linalg.eigvalsh(keys.T @ keys))[::-1]
    np.testing.assert_allclose(found.energy, eigenvalues / np.square(keys).sum(), rtol=1e-5)


def test_keys_of_two_directions_have_their_energy_there():
    flat = made_up(n=30)
    flat.keys[:, :, 2:] = 0
    found = channels(flat, 0)
    assert found.energy[:2].sum() == pytest.approx(1) and found.magnitude[2:].sum() == 0
    assert "2 of 8 channels carry 90% of the logits' magnitude, and 2 directions" in str(found)


@pytest.mark.parametrize("window", [0, 6])
def test_factors_are_a_plain_loop_over_the_keys_before_the_last_query(window):
    vectors = made_up(window=window)
    found = factors(vectors)
    for head in range(4):
        query = vectors.queries[head, -1].astype(float)
        keys = [key.astype(float) for key in vectors.keys[head // 2, (6 if window else 0) : 11]]
        lengths = [math.sqrt(sum(key**2)) for key in keys]
        size = math.sqrt(sum(query**2))
        cosines = [sum(query * key) / size / length for key, length in zip(keys, lengths, strict=True)]
        row = slow_row(query, keys, 0.4)

        def from_logits(pairs, size=size):
            weights = [math.exp(0.4 * size * length * cosine) for length, cosine in pairs]
            return [weight / sum(weights) for weight in weights]

        mean_length, mean_cosine = sum(lengths) / len(keys), sum(cosines) / len(keys)
        equal_lengths = from_logits([(mean_length, cosine) for cosine in cosines])
        equal_directions = from_logits([(length, mean_cosine) for length in lengths])
        assert found.without_length[0, head] == pytest.approx(moved(row, equal_lengths), abs=1e-6)
        assert found.without_direction[0, head] == pytest.approx(moved(row, equal_directions), abs=1e-6)
        assert found.by_length[0, head] == pytest.approx(slow_spearman(lengths, row), abs=1e-6)
        assert found.by_direction[0, head] == pytest.approx(slow_spearman(cosines, row), abs=1e-6)


def slow_spearman(x, y) -> float:
    """Of values without ties: 1 - 6 * sum of squared differences of ranks / (n^3 - n)."""
    n = len(x)
    ranks = [[sorted(values).index(value) for value in values] for values in (x, y)]
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n**3 - n)


def test_equal_lengths_leave_no_order_and_directions_that_agree_leave_the_attention_to_length():
    vectors = made_up()
    vectors.keys[:] /= np.linalg.norm(vectors.keys, axis=-1, keepdims=True)
    found = factors(vectors)
    assert np.isnan(found.by_length).all() and (found.without_length < 1e-6).all()
    assert "In 4 of 4 heads the direction" in str(found)

    query = vectors.queries[:, -1]
    alike = np.arange(1, 13)[None, :, None] * query[:, None]
    by_length = factors(replace(vectors, keys=alike.astype(np.float32)))
    np.testing.assert_allclose(by_length.by_length, 1)
    assert "In 0 of 4 heads the direction" in str(by_length)
    short = factors(made_up(n=3))
    assert np.isnan(short.without_length).all() and "No head tells" in str(short)
    assert Factors.of([found, by_length]).by_length.shape == (2, 4)


# all of them


@pytest.fixture(scope="module")
def reproduced(load):
    stages = []
    made = dict(reproduce(load("llama"), [TEXT, TEXT * 2], progress=lambda *stage: stages.append(stage)))
    assert (2, 2, "excerpts") in stages and (3, 3, "layers") in stages
    return made


def test_every_figure_has_numbers_a_record_and_a_page(reproduced):
    assert list(reproduced) == list(FIGURES)
    for name, numbers in reproduced.items():
        content = json.loads(to_json(name, numbers, {"model": "llama"}))
        assert content["l2kv_figure"] == VERSION
        assert content["figure"] == name and content["model"] == "llama" and content["paper"] == FIGURES[name].paper
        shown = paper.section(name, numbers)
        assert shown.drawings and FIGURES[name].paper in shown.words[-1]
        page = document(shown.heading, "", [shown], data=json.dumps(content))
        assert page.count('class="plot"') == len(shown.drawings)
    np.testing.assert_allclose(
        json.loads(to_json("fig7", reproduced["fig7"], {}))["numbers"]["excess"],
        reproduced["fig7"].excess,
    )


def test_only_what_is_asked_for_is_made(load):
    assert [name for name, _ in reproduce(load("llama"), [TEXT], only=["factors", "fig7"])] == ["fig7", "factors"]
    with pytest.raises(ValueError, match="got fig3"):
        next(reproduce(load("llama"), [TEXT], only=["fig3"]))
    with pytest.raises(ValueError, match="at least one text"):
        next(reproduce(load("llama"), []))


def test_the_drawn_figures_say_what_the_numbers_say(reproduced):
    key, zeroed = reproduced["fig8"].of, reproduced["fig9"].of
    bars = [
        trace
        for trace in figures.key_dimensions(key.sink, key.others, key.spread, key.peaks).data
        if trace.type == "bar"
    ]
    assert sorted(bars[1].x) == sorted(key.peaks) and len(bars[0].x) + len(bars[1].x) == len(key.sink)
    np.testing.assert_array_equal(bars[1].y, key.sink[bars[1].x])
    shares = np.array([each.sink_share for each in zeroed.random])
    strip = figures.zeroed_dimensions({"share": (0.5, 0.25, shares), "moved": (None, 0.1, shares)})
    np.testing.assert_array_equal(np.sort(strip.data[0].x), np.sort([*shares, *shares]))
    assert list(strip.data[1].x) == [0.5] and list(strip.data[2].x) == [0.25, 0.1]
    two = reproduced["fig7"]
    curves = figures.excess_loss(two.dropped, *two.excess, names=("best", "worst")).data
    np.testing.assert_array_equal([curve.y for curve in curves], two.excess)
    plane = figures.factor_plane(np.array([[0.1, np.nan]]), np.array([[0.2, 0.3]]))
    assert list(plane.data[0].x) == [0.1] and list(plane.data[0].y) == [0.2]


# experiments


def specs_of(case) -> dict[str, tuple]:
    return {
        name: (spec.policy, spec.keep_ratio, spec.prune_after, spec.skip_layers, spec.protect_last)
        for name, spec in case.methods.items()
        if spec
    }


def test_retrieval_is_asked_of_needles_and_passkeys_at_all_lengths_and_depths():
    loaded = load_model("books-5m", device="cpu")
    for name, lines in (
        ("fig4", {policy: (policy, (0, 1)) for policy in ("low_norm", "high_norm", "random")}),
        (
            "fig16",
            {
                "no layer skipped": ("low_norm", ()),
                "layer 0 skipped": ("low_norm", (0,)),
                "layers 0, 1 skipped": ("low_norm", (0, 1)),
            },
        ),
    ):
        needle, passkey = experiments.cases(loaded, name, experiments.Size(400, 2, (0.5, 0.1)))
        assert (needle.task, passkey.task) == ("needle", "passkey")
        assert needle.settings.lengths == passkey.settings.lengths == (100, 200, 400)
        assert needle.settings.samples == passkey.settings.keys == 2
        assert len(needle.settings.depths) == 5 and needle.texts is None
        expected = {
            f"{line} {keep}": (policy, keep, 0, skip, 0)
            for keep in (0.5, 0.1)
            for line, (policy, skip) in lines.items()
        }
        assert specs_of(needle) == specs_of(passkey) == expected and needle.methods["full cache"] is None


def test_prediction_evicts_as_the_papers_code_does_at_shares_of_the_excerpt_that_is_there():
    loaded = load_model("books-5m", device="cpu")
    size = experiments.Size(200, 3, (0.5, 0.25))
    documents = {"a": TEXT * 20, "b": TEXT * 20}
    (case,) = experiments.cases(loaded, "fig3", size, documents=documents)
    assert case.settings.chunk_size == 200 and [text.document for text in case.texts] == ["a", "b", "a"]
    assert specs_of(case) == {
        f"{policy} {share}": (policy, 0.98, int(200 * share), (0, 1), 0)
        for share in (0.5, 0.25)
        for policy in ("low_norm", "high_norm", "random")
    }
    assert {spec.schedule for spec in case.methods.values() if spec} == {"reference"}
    (bundled,) = experiments.cases(loaded, "fig6", experiments.Size(100_000, 1, (0.5,)))  # longer than they are
    assert bundled.settings.chunk_size < 5000 and len(bundled.texts) == 1
    assert {spec.prune_after for spec in bundled.methods.values() if spec} == {round(bundled.settings.chunk_size / 2)}
    assert list(bundled.methods) == ["full cache", "low_norm 0.5", "fastgen 0.5"]


def test_longbench_is_a_part_for_each_file_and_needs_one():
    loaded = load_model("books-5m", device="cpu")
    size = experiments.EXPERIMENTS["fig5"].quick
    cases = list(experiments.cases(loaded, "fig5", size, files=["a/hotpotqa.jsonl", "qasper.jsonl"]))
    assert [(case.name, case.settings.path) for case in cases] == [
        ("hotpotqa", "a/hotpotqa.jsonl"), ("qasper", "qasper.jsonl"),
    ]  # fmt: skip
    assert {case.settings.n_tokens for case in cases} == {min(size.tokens, loaded.positions)}
    with pytest.raises(SettingsError, match="give them by --path"):
        next(experiments.cases(loaded, "fig5", size))
    with pytest.raises(SettingsError, match="experiment must be one of"):
        next(experiments.cases(loaded, "fig1", size))


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_an_experiment_says_what_differs_and_is_smaller_for_a_laptop(name):
    experiment = experiments.EXPERIMENTS[name]
    assert experiment.here.endswith(".") and experiment.paper.endswith(".")
    assert experiment.quick.tokens < experiment.size.tokens and experiment.quick.samples <= experiment.size.samples
    assert set(experiment.quick.keep_ratios) <= set(experiment.size.keep_ratios)
