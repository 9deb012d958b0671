"""A saved run is small, and its metrics are those of the run: against the paper's sums, written out by hand."""

import numpy as np
import pytest
from scipy import stats

from analysis import capture, load_model
from analysis.captures import _PACKED, _PLAIN, load_run, save_run
from analysis.metrics import PROBES, by_query, metrics
from analysis.packing import deflated, inflated, quantised, restored
from tests.support.paths import ROOT

TEXTS = ROOT / "analysis" / "bundled" / "texts"
BOUND = 0.01  # of what is said of a head, from -1 to 1
RANDOM = np.random.default_rng(5)
N = 600
ROWS = {
    "heavy tail": np.exp(RANDOM.normal(0, 2, N)),
    "heavier tail": np.exp(RANDOM.normal(0, 5, N)),
    "from 1 to 1e-30": np.exp(-RANDOM.random(N) * 69),
    "even": 1 + 0.01 * RANDOM.random(N),
    "many zeros": np.exp(RANDOM.normal(0, 2, N)) * (RANDOM.random(N) < 0.2),
    "many equals": RANDOM.integers(1, 5, N) / 4,
    "powers of two": 2.0 ** -(np.arange(N) % 100),
}
SINKS = {"no sink": (), "a sink": (0,), "a sink in the middle": (300,), "two sinks": (0, 17)}


def row_of(name: str, sink: str) -> np.ndarray:
    weights = ROWS[name] / ROWS[name].sum()
    for place in SINKS[sink]:
        weights[place] = 200 * (1 + place / 1000)
    return (weights / weights.sum()).astype(np.float32)


def by_hand(weights: np.ndarray, norm: list[float]) -> tuple[float, float, float]:
    """Γ, ALR over its sum of attention and tokens, and Spearman's, by the losses of dropping 1, 2, 3, ... tokens."""
    a = weights.astype(float).tolist()
    n = len(a)

    def losses(order):  # of dropping ever more of them
        total, summed = 0.0, 0.0
        for place in order:
            total += a[place]
            summed += total
        return summed

    dropped_last = sorted(range(n), key=lambda i: norm[i])
    ideal = losses(sorted(range(n), key=lambda i: a[i]))
    alr = losses(dropped_last[::-1]) - ideal
    chance = sum(a) * (n + 1) / 2 - ideal
    return alr / chance - 1, alr / sum(a) / n, stats.spearmanr(norm, a).statistic


@pytest.mark.parametrize("levels", [140, 4094])
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_the_same_with_and_without_its_sink(name, sink, levels):
    row = row_of(name, sink)
    back = restored(*quantised(row[None, None], levels), levels)[0, 0]
    others = [i for i in range(N) if i not in SINKS[sink]]
    for weight in (-0.3, 0.0, 0.3):  # of norms that go with the attention, against it, and not at all
        order = stats.rankdata(row) * weight / N + np.random.default_rng(1).random(N)
        for places in (range(N), others):
            norm = [float(order[i]) for i in places]
            before, after = (by_hand(values[list(places)], norm) for values in (row, back))
            assert after == pytest.approx(before, abs=BOUND)


@pytest.mark.parametrize("levels", [140, 4094])
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("name", ROWS)
def test_no_two_tokens_change_places_and_zeros_and_equals_stay_so(name, sink, levels):
    row = row_of(name, sink)
    codes, ends = quantised(row[None, None], levels)
    back = restored(codes, ends, levels)[0, 0]
    in_order = np.argsort(row, kind="stable")
    assert (np.diff(back[in_order]) >= 0).all()
    assert ((back == 0) == (row == 0)).all()
    for weight in np.unique(row):
        assert len(set(back[row == weight])) == 1
    assert back.max() == row.max() and back.argmax() == row.argmax()
    np.testing.assert_array_equal(restored(*quantised(back[None, None], levels), levels)[0, 0], back)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 1, 0), (2, 3, 1), (2, 3, 2)])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-45])
def test_rows_of_nothing_of_one_weight_and_of_equals_come_back(shape, value):
    rows = np.full(shape, value, np.float32)
    np.testing.assert_array_equal(restored(*quantised(rows, 140), 140), rows)


@pytest.mark.parametrize("along", [None, 0, 1, -2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_is_compressed_comes_back_exactly(along, dtype):
    if along is not None and dtype == np.float32:
        return  # differences of whole numbers only
    values = np.random.default_rng(2).integers(0, 256, (3, 4, 5)).astype(dtype)
    for given in (values, values[:0], values.transpose(2, 0, 1), values[:, ::2]):
        back = inflated(deflated(given, along=along), given.shape, dtype, along=along)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, given)


@pytest.fixture(scope="module")
def run():
    return capture(load_model("books-5m", device="cpu"), (TEXTS / "anne.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    return save_run(run, tmp_path_factory.mktemp("runs") / "run.safetensors")


@pytest.mark.parametrize("probe", PROBES)
def test_the_metrics_of_a_model_are_those_of_its_run_before_it_was_saved(run, path, probe):
    before, after = metrics(run, probe=probe), metrics(load_run(path), probe=probe)
    np.testing.assert_array_equal(after.status, before.status)
    for name in (
        "gamma",
        "gamma_skip_first",
        "normalised_alr",
        "alr_per_token",
        "spearman",
        "pearson",
        "overlap",
    ):
        np.testing.assert_allclose(after.of(name), before.of(name), atol=BOUND, rtol=0)
    np.testing.assert_allclose(after.of("alr"), before.of("alr"), rtol=BOUND)


def test_each_of_the_last_queries_says_the_same_too(run, path):
    for name in ("gamma", "gamma_skip_first", "normalised_alr", "spearman"):
        np.testing.assert_allclose(by_query(load_run(path), name), by_query(run, name), atol=BOUND, rtol=0)


def test_the_norms_of_a_saved_run_are_exact(run, path):
    for name in ("key_norm", "value_norm", "pooled_attention", "pooled_scale", "token_ids", "token_spans"):
        np.testing.assert_array_equal(getattr(load_run(path), name), getattr(run, name))


def test_a_saved_run_takes_little_more_than_a_quarter_of_its_arrays(run, path):
    assert path.stat().st_size < 0.3 * sum(getattr(run, name).nbytes for name in (*_PLAIN, *_PACKED))
