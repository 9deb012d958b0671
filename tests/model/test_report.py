"""Reports for readers who have nothing installed: complete, safe, and true; and comparisons against slow loops."""

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs_version

from analysis import correlation, load_run, save_run
from analysis.comparing import compare
from analysis.demo import presets
from analysis.evaluation.results import Results, Row
from analysis.metrics import METRICS
from analysis.records import load, save
from analysis.studies import Study, save_study, study_of
from analysis.verdicts import answer, verdicts
from app.cli import main
from app.report import VERSION, report
from app.report.writing import MOST_ROWS, Drawing, Section, document
from l2kv import CompressionSpec
from tests.support.evaluation import ablation_of, front_of
from tests.support.runs import random_run, run_of
from tests.support.texts import HOSTILE


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch, request):
    """0.7 MB in every page, which say nothing of it."""
    if "plotly_itself" not in request.fixturenames:
        monkeypatch.setattr("app.report.writing._plotly", lambda: "plotly")


@pytest.fixture
def plotly_itself():
    """For tests of what a browser makes of a page."""


class Page(HTMLParser):
    """Tags, the text that a reader sees, and the JSON of each data script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.data, self._script = [], "", [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._script = dict(attributes).get("type", "")

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        elif self._script == "application/json":
            self.data.append(json.loads(data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def study_over(runs, digests) -> Study:
    """The study of several texts that runs are."""
    return replace(study_of(*runs), digests=tuple(digests))


@pytest.fixture(scope="module")
def studies():
    first = [random_run(i) for i in range(8)]
    second = [random_run(100 + i) for i in range(8)]
    return study_over(first, map(str, range(8))), study_over(second, map(str, range(8)))


@pytest.fixture
def front():
    points = [
        (strategy, keep, CompressionSpec(keep_ratio=keep), (0.1, 0.2 / keep))
        for strategy in ("uniform_low", "by_head")
        for keep in (0.3, 0.5)
    ]
    return front_of(points, nbytes={0.3: int(0.3 * 2**20), 0.5: 2**19}, full_nbytes=2**20)


@pytest.fixture
def ablation():
    rng = np.random.default_rng(0)
    change, loss = rng.normal(size=(2, 3, 4))
    return ablation_of(change, loss)


# the page


def test_a_page_loads_nothing_from_anywhere_and_may_not():
    section = Section("Heading", ("Words.",), (Drawing(go.Figure(), alt="alt", caption="caption"),))
    page = Page(document("Title", "Lead", [section], data='{"a": 1}'))
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base") and not {"src", "srcset"} & set(attributes), tag
        assert attributes.get("href", "#").startswith("#")
    assert page.count("noscript") == page.count("figure") == 1
    assert page.data[0]["layout"] is not None and page.data[1] == {"a": 1}
    assert "Title" in page.text and "Lead" in page.text and "caption" in page.text


def test_a_page_without_figures_needs_no_plotly():
    assert len(document("Title", "Lead", [Section("Heading", links=(("there", "fig1.html"),))])) < 10_000


def test_the_bundle_in_the_page_is_of_the_version_that_makes_the_figures(plotly_itself):
    html = document("Title", "", [Section("x", drawings=(Drawing(go.Figure(), alt="", caption=""),))])
    (packed,) = re.findall('<script type="text/plain" id="plotly">(.*?)</script>', html)
    source = gzip.decompress(base64.b64decode(packed)).decode()
    assert f"v{get_plotlyjs_version()}\n" in source[:200] and "MIT license" in source[:300]
    assert len(html) < 700_000


def test_hostile_words_stay_words_wherever_they_stand():
    figure = go.Figure(go.Scatter(x=[0], y=[0], text=[HOSTILE]))
    drawing = Drawing(figure, alt=HOSTILE, caption=HOSTILE, title=HOSTILE, table={HOSTILE: [HOSTILE]})
    section = Section(HOSTILE, (HOSTILE,), (drawing,), table={"x": [HOSTILE]}, code=((HOSTILE, HOSTILE),))
    html = document(HOSTILE, HOSTILE, [section], data=json.dumps({"text": HOSTILE}))
    page, plain = Page(html), Page(html.replace(HOSTILE, ""))
    assert page.count("img") == 0 and page.count("script") == plain.count("script") == 4
    assert "<script>alert" not in html
    assert page.text.count("<script>alert(1)</script>") == 12 and "U+202E" in page.text
    assert page.data[0]["data"][0]["text"] == [HOSTILE] and page.data[1] == {"text": HOSTILE}
    assert [a["aria-label"] for _, a in page.tags if "aria-label" in a] == [HOSTILE.replace("\u202e", "U+202E")]


def test_a_table_writes_numbers_as_a_reader_wants_them_and_says_what_it_leaves_out():
    table = {"n": [-1.23456, np.nan, 4096], "yes": [True, np.False_, True]}
    cells = re.findall("<td.*?>([^<]*)", document("", "", [Section("x", table=table)]))
    assert cells == ["−1.235", "yes", "–", "no", "4,096", "yes"]
    long = Page(document("", "", [Section("x", table={"n": range(MOST_ROWS + 7)})]))
    assert "7 more rows are not shown" in long.text and long.count("tr") == MOST_ROWS + 1


# the report


def test_a_report_answers_first_and_holds_all_that_is_given(studies, front, ablation):
    run = random_run()
    page = Page(report([run], studies=studies[:1], front=front, ablation=ablation))
    assert page.text.index(answer(study_of(run))) < page.text.index("Where it holds")
    headings = ("Where it holds", "The best and the worst head", "Layers to skip", "What it saves", "Over many")
    for words in (
        *headings,
        "What each allocation strategy costs",
        "Each layer compressed alone",
        "How to read",
    ):
        assert page.text.count(words) >= 2, words  # in the contents, and where it stands
    assert str(ablation) in page.text and front.answer() in page.text and "CompressionSpec(" in page.text
    assert "Compared" not in page.text
    assert all(attributes["aria-label"] for tag, attributes in page.tags if attributes.get("class") == "plot")
    assert page.data[-1]["l2kv_report"] == VERSION
    told = page.data[-1]["runs"][0]
    np.testing.assert_allclose(told["heads"]["gamma"], correlation(run), rtol=1e-5)  # it holds six digits
    assert set(told["heads"]) == {*METRICS, "verdict"}
    assert CompressionSpec(**told["spec"] | {"skip_layers": tuple(told["spec"]["skip_layers"])}).protect_last == 32


def test_the_advice_is_of_the_study_of_the_same_model_and_of_the_run_without_one(studies):
    run = random_run()
    assert "on this text of 40 tokens" in report([run])
    other = replace(studies[0], model="another")
    assert "on this text of 40 tokens" in report([run], studies=[other])
    assert "on this text of 40 tokens" not in report([run], studies=studies[:1])


def test_hostile_tokens_texts_and_models_stay_text():
    run = random_run(model=HOSTILE, text=HOSTILE.ljust(40), labels=(HOSTILE,) * 40, warnings=(HOSTILE,))
    page, plain = Page(report([run])), Page(report([random_run()]))
    assert page.count("script") == plain.count("script") and page.count("img") == 0
    assert HOSTILE.replace("\u202e", "U+202E") in page.text


def test_a_run_without_any_order_says_so():
    page = Page(report([run_of(np.ones((2, 1, 9)), np.full((2, 2, 9), 0.1))]))
    assert "This run cannot tell" in page.text and "No head has a defined Γ" in page.text
    assert "the suggestion skips them all" in page.text


def test_two_runs_are_compared_by_head_where_they_can_be():
    same = Page(report([random_run(0), random_run(1)]))
    assert "made up, run 1 against made up, run 2" in same.text and "Head by head" in same.text
    other = Page(report([random_run(0), random_run(1, layers=2, kv_heads=1, group=2, model="small")]))
    assert "made up against small" in other.text and "no head of one is a head of the other" in other.text
    assert "Γ of all heads" in other.text and "Head by head" not in other.text
    with pytest.raises(ValueError, match="got 3"):
        report([random_run()] * 3)


# comparisons


def test_a_comparison_of_runs_is_a_plain_loop_over_heads():
    first, second = random_run(0), random_run(1)
    found = compare(study_of(first), study_of(second))
    gammas = [correlation(run) for run in (first, second)]
    np.testing.assert_array_equal(found.difference.mean, gammas[1] - gammas[0])
    flat = [list(gamma.ravel()) for gamma in gammas]
    ranks = [[sorted(values).index(value) for value in values] for values in flat]
    n = len(ranks[0])
    rho = 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n**3 - n)
    assert found.agreement == pytest.approx(rho)
    for run, counts in zip((first, second), found.verdicts, strict=True):
        said = verdicts(study_of(run)).ravel().tolist()
        assert counts == {name: said.count(name) for name in counts} and sum(counts.values()) == n
    turned = sum(a * b < 0 for a, b in zip(*flat, strict=True))
    assert f"its sign in {turned} of {n} heads" in str(found)


def test_studies_of_the_same_texts_are_compared_text_by_text(studies):
    first, second = studies
    found = compare(first, second)
    by_text = second.of("gamma") - first.of("gamma")
    assert found.paired
    np.testing.assert_allclose(found.difference.mean, by_text.mean(axis=0))
    shifted = replace(second, values=first.values + np.where(np.isfinite(first.values), 0.25, 0))
    constant = compare(first, shifted).difference
    np.testing.assert_allclose([constant.low, constant.high], 0.25)  # paired: no text differs from another


def test_studies_of_other_texts_are_resampled_each_by_itself(studies):
    first, second = studies
    apart = replace(second, digests=tuple(map(str, range(8, 16))))
    found, paired = compare(first, apart), compare(first, second)
    assert not found.paired and "different texts" in str(found)
    np.testing.assert_allclose(found.difference.mean, paired.difference.mean)
    spread = [study.of("gamma").std(axis=0) / np.sqrt(8) for study in studies]
    half = (found.difference.high - found.difference.low) / 2
    np.testing.assert_allclose(half, 1.96 * np.hypot(*spread), rtol=0.2)  # the normal approximation, roughly
    both = "".join(str(compare(first, replace(apart, model="x"))))
    assert "in x than in made up" in both
    small = study_over([random_run(i, layers=2, kv_heads=1, group=2) for i in range(6)], "abcdef")
    assert compare(first, small).difference is None


def test_a_comparison_of_few_texts_tells_of_no_head_and_of_more_what_chance_gives():
    runs = [random_run(i) for i in range(12)]
    few = compare(study_over(runs[:5], "abcde"), study_over(runs[5:10], "abcde"))
    assert "no head is defined in 6 texts or more" in str(few)
    found = compare(study_over(runs[:6], "abcdef"), study_over(runs[6:], "abcdef"))
    # Of 6 texts an interval covers 87 % (see test_statistics): 2.4 of 18 heads are called though none differs.
    assert found.by_chance == pytest.approx(2.4, abs=0.05) and "about 2.4 heads" in str(found)
    above, below = (int((end > 0).sum()) for end in (found.difference.low, -found.difference.high))
    assert f"in {above} of 18 heads, lower in {below}," in str(found)


# the commands


def test_the_report_command_writes_a_page_of_files(tmp_path, capsys, studies, front, ablation):
    save_study(studies[0], tmp_path / "study.safetensors")
    save(front, tmp_path / "front.json")
    save(ablation, tmp_path / "causal.json")
    run, out = save_run(random_run(), tmp_path / "run.safetensors"), tmp_path / "report.html"
    given = [str(tmp_path / name) for name in ("study.safetensors", "front.json", "causal.json")]
    assert main(["report", *given, str(run), str(presets.bundled_results("books-5m").demo), "-o", str(out)]) == 0
    assert "wrote" in capsys.readouterr().err
    text = Page(out.read_text()).text
    assert "made up against books-5m" in text and "Over many texts" in text


@pytest.mark.parametrize("heading", ["", "l2kv_front", "l2kv_ablation"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, capsys, heading):
    run, broken, out = tmp_path / "run.safetensors", tmp_path / "broken.json", tmp_path / "report.html"
    save_run(random_run(), run)
    broken.write_text(f'{{"{heading}": 2}}' if heading else "nonsense")
    assert main(["report", str(run), str(broken), "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "broken" in error and error.count("\n") == 1 and not out.exists()


def test_a_broken_study_is_one_line_that_names_it(tmp_path, capsys, studies):
    study, out = tmp_path / "broken.safetensors", tmp_path / "report.html"
    save_study(studies[0], study)
    study.write_bytes(study.read_bytes()[:-100])
    assert main(["report", str(study), "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "broken" in error and error.count("\n") == 1 and not out.exists()


def test_a_report_without_a_run_or_with_three_is_refused(tmp_path, capsys, studies):
    run, study, out = tmp_path / "run.safetensors", tmp_path / "study.safetensors", str(tmp_path / "x.html")
    save_run(random_run(), run)
    save_study(studies[0], study)
    for given in ([run] * 3, [study], [run, study, study, study]):
        assert main(["report", *map(str, given), "-o", out]) == 2
        assert "of one run or of two" in capsys.readouterr().err


def test_the_paper_command_writes_pages_and_records(tmp_path, capsys):
    text = tmp_path / "keats.txt"
    text.write_text(presets.bundled_texts()["The Tomb of Keats (Oscar Wilde, 1877)"])
    options = ["-m", "books-5m", "--heads", "2.1", "--tokens", "60", "--excerpts", "2"]
    assert main(["paper", "fig1,fig7", str(text), "-o", str(tmp_path / "out"), *options]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "fig1.html", "fig1.json", "fig7.html", "fig7.json", "index.html",
    ]  # fmt: skip
    content = json.loads((tmp_path / "out" / "fig1.json").read_text())
    assert content["l2kv_figure"] == 2
    assert content["numbers"]["heads"] == [[2, 1]] and content["texts"] == ["keats 0", "keats 1"]
    index = Page((tmp_path / "out" / "index.html").read_text())
    assert {"fig7.html", "fig7.json"} <= {attributes.get("href") for _, attributes in index.tags}
    capsys.readouterr()
    for bad, reason in (
        (["fig11"], "got 'fig11'"),
        (["fig1", "--heads", "1"], "layer.head"),
        (["fig1", "--heads", "9.0"], "6 layers"),
        (["fig1", "--quick"], "leave out --quick"),
        (["fig3", "--path", "x.jsonl"], "leave out --path"),
        (["fig3", "--heads", "0.0"], "leave out --heads"),
        (["fig5"], "give them by --path"),
    ):
        figure, *others = bad
        given = ["paper", figure, str(text), "-o", str(tmp_path / "no"), "-m", "books-5m", "--tokens", "60", *others]
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_an_experiment_of_the_paper_is_written_row_by_row_and_never_measured_twice(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = ["-m", "books-5m", "--quick", "--tokens", "40", "--excerpts", "2", "-o", str(out), "--device", "cpu"]
    assert main(["paper", "fig3", *options]) == 0
    assert "fig3-lm: about " in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == ["fig3-lm.jsonl", "fig3.html", "fig3.json"]
    results = load(Results, out / "fig3-lm.jsonl")
    assert list(results.methods) == ["full cache", "low_norm 0.5", "high_norm 0.5", "random 0.5"]
    assert len(results.samples) == 2 and len(results.positions) == 39
    text = Page((out / "fig3.html").read_text()).text
    assert "Figure 3: Prediction by position" in text and "high norms is far worse than random" in text
    for title in (
        "Prediction against bytes",
        "NLL by position",
        "Perplexity ratio by position",
        "Accuracy by position",
    ):
        assert title in text
    content = json.loads((out / "fig3.json").read_text())
    assert [one["task"] for one in content["numbers"]] == ["lm"] and "98 %" in content["here"]

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", None)  # nothing is left to compute
    monkeypatch.setattr("analysis.evaluation.work.estimate", lambda *_, **__: "no time")
    assert main(["paper", "fig3", *options]) == 0
    assert load(Results, out / "fig3-lm.jsonl").rows == results.rows


def test_each_file_of_longbench_is_a_part_of_figure_5(tmp_path):
    for name in ("2wikimqa", "hotpotqa"):
        example = {
            "input": "Who came?", "context": "Ann came. " * 30, "answers": ["Ann"], "length": 60, "dataset": name,
            "language": "en", "all_classes": None, "_id": "0",
        }  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(example))
    paths = [word for name in ("2wikimqa", "hotpotqa") for word in ("--path", str(tmp_path / f"{name}.jsonl"))]
    options = ["-m", "books-5m", "--quick", "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(["paper", "fig5", *paths, *options]) == 0
    assert (tmp_path / "out" / "fig5-2wikimqa.jsonl").is_file()
    text = Page((tmp_path / "out" / "fig5.html").read_text()).text
    assert "LongBench: 2wikimqa" in text and "LongBench: hotpotqa" in text and "a small decrease with 50 %" in text


def test_results_make_a_report_of_their_own_or_a_part_of_one(tmp_path, capsys):
    methods = {"full cache": None, "low_norm 0.5": CompressionSpec()}
    rows = tuple(Row(name, f"{i}", 1.0, 2**20, at={"n_tokens": 9, "depth": 0.5}) for name in methods for i in range(3))
    file, out = tmp_path / "results.jsonl", tmp_path / "report.html"
    save(Results("a model", "", "passkey", {}, methods, rows), file)
    assert main(["report", str(file), "-o", str(out)]) == 0
    page = Page(out.read_text())
    assert "What compression costs in a model" in page.text and "Passkey against bytes, n = 3" in page.text
    (numbers,) = [one for one in page.data if "l2kv_report" in one]
    (of,) = numbers["results"]
    assert [row["score"]["value"] for row in of["rows"]] == [1, 1]
    run = save_run(random_run(), tmp_path / "run.safetensors")
    assert main(["report", str(run), str(file), "-o", str(out)]) == 0
    text = Page(out.read_text()).text
    assert "Does low norm predict attention in made up?" in text and "Passkey against bytes" in text


def test_a_saved_run_makes_the_same_report(tmp_path):
    run = load_run(save_run(random_run(), tmp_path / "run.safetensors"))  # with attention in steps
    assert report([load_run(save_run(run, tmp_path / "run.safetensors"))]) == report([run])
