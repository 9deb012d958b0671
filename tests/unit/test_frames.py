"""kvpress's data frames: the same examples from every format, and what is malformed refused."""

import pandas as pd
import pytest

from analysis.errors import RecordError, SettingsError
from analysis.evaluation.frames import read_frame, scorer_of
from analysis.evaluation.scoring import score

ROWS = [
    {
        "context": "A special magic number is hidden.\nOne of them is 123.\n",
        "question": "What is the number?",
        "answer_prefix": "The number is",
        "answer": ["123", "it's 4"],
        "task": "niah_multivalue",
        "max_new_tokens": 128,
    },
    {
        "context": "c",
        "question": 'q, "quoted"',
        "answer_prefix": "",
        "answer": ["NA"],
        "task": "qa_1",
        "max_new_tokens": 32,
    },
]


def saved(folder, suffix, rows, **options):
    frame, path = pd.DataFrame(rows), folder / f"frame{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False, **options)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    first, second = read_frame(saved(tmp_path, suffix, ROWS))
    assert (first.context, first.question, first.answer_prefix) == tuple(
        ROWS[0][k] for k in ("context", "question", "answer_prefix")
    )
    assert first.references == ("123", "it's 4") and first.max_new_tokens == 128 and first.scorer == "string_match_all"
    assert second.references == ("NA",) and second.answer_prefix == "" and second.question == 'q, "quoted"'
    assert second.scorer == "string_match_part" and score(first, "123") == 50


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_single_answer_may_be_text_and_longbench_calls_them_answers(tmp_path, suffix):
    row = {name: value for name, value in ROWS[1].items() if name != "answer"}
    rows = [row | {"task": "trec", "answers": ["Food"], "all_classes": ["Food", "Other number"], "length": 3}]
    (example,) = read_frame(saved(tmp_path, suffix, rows))
    assert example.all_classes == ("Food", "Other number") and example.scorer == "classification"
    (example,) = read_frame(saved(tmp_path, suffix, [row | {"task": "qmsum", "answers": "a summary"}]))
    assert example.references == ("a summary",) and example.scorer == "rouge_l"


def test_text_that_looks_like_a_list_is_one_only_in_csv(tmp_path):
    rows = [ROWS[1] | {"answer": "[1, 2]"}]
    assert read_frame(saved(tmp_path, ".parquet", rows))[0].references == ("[1, 2]",)
    assert read_frame(saved(tmp_path, ".csv", rows))[0].references == ("1", "2")


@pytest.mark.parametrize(
    ("task", "scorer"),
    [
        ("vt", "string_match_all"),
        ("qa_2", "string_match_part"),
        ("hotpotqa_e", "token_f1"),
        ("0shot", "choice"),
        ("loogle", None),
    ],
)
def test_tasks_have_the_scores_of_their_benchmarks(task, scorer):
    assert scorer_of(task) == scorer


def test_a_task_of_no_benchmark_needs_a_scorer_by_name(tmp_path):
    path = saved(tmp_path, ".csv", [ROWS[0] | {"task": "loogle"}])
    with pytest.raises(
        SettingsError, match=r"row 0: no scorer is known for the task 'loogle'\. Name one of string_match_all"
    ):
        read_frame(path)
    assert read_frame(path, scorer="token_f1")[0].scorer == "token_f1"
    with pytest.raises(SettingsError, match=r"Did you mean 'token_f1'\?"):
        read_frame(path, scorer="tokenf1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": []}, "row 1: it has no right answer"),
        ({"answer": "['a' 'b']"}, r"row 1: `answers` begins as a list, but is none: .* as JSON"),  # as NumPy writes it
        ({"answer": "['a', f()]"}, "begins as a list"),
        ({"answer": [" "]}, "row 1: a right answer is empty"),
        ({"task": "passage_retrieval_en"}, "row 1: a right answer names no paragraph"),
        ({"task": "trec"}, "row 1: it has no classes to choose from"),
        ({"max_new_tokens": 0}, "row 1: `max_new_tokens` must be"),
        ({"max_new_tokens": "many"}, "row 1: `max_new_tokens` must be"),
    ],
)
def test_malformed_rows_are_refused_with_place_and_reason(tmp_path, changes, reason):
    with pytest.raises(RecordError, match=reason):
        read_frame(saved(tmp_path, ".csv", [ROWS[0], ROWS[1] | changes]))


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(RecordError, match="row 1: `question` must be text"):
        read_frame(saved(tmp_path, ".parquet", [ROWS[0], ROWS[1] | {"question": None}]))


def test_files_that_are_no_frames_are_refused(tmp_path):
    with pytest.raises(RecordError, match=r"lacks the columns answer_prefix, answer; it has context"):
        read_frame(saved(tmp_path, ".csv", [{"context": "c", "question": "q", "task": "vt", "max_new_tokens": 1}]))
    with pytest.raises(RecordError, match="must end in"):
        read_frame(tmp_path / "frame.txt")
    for suffix in (".csv", ".parquet", ".jsonl"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"\x00\xff")
        with pytest.raises(RecordError, match=r"cannot be read|lacks the columns"):
            read_frame(path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_frame(tmp_path / "none.csv")
    pd.DataFrame(ROWS).head(0).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(RecordError, match="no examples"):
        read_frame(tmp_path / "empty.parquet")
