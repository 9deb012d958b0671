"""LongBench's files: the prompts are the published ones, and what is malformed is refused with place and reason."""

import json

import pytest
from transformers import AutoTokenizer

from analysis.errors import RecordError, TextError
from analysis.evaluation.longbench import LONGBENCH, OF_THE_PAPER, read_longbench, read_longbench2
from analysis.evaluation.scoring import SCORERS, score
from tests.support.paths import BUNDLED

# As published, whole; a program that splits them may not change a character.
PROMPTS = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the "
        "question as concisely as you can, using a single phrase if possible. Do not provide any "
        "explanation.\n\nStory: {context}\n\nNow, answer the question based on the story as concisely as you "
        "can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\n"
        "Answer:"
    ),
    "qasper": (
        "You are given a scientific article and a question. Answer the question as concisely as you can, "
        "using a single phrase or sentence if possible. If the question cannot be answered based on the "
        'information in the article, write "unanswerable". If the question is a yes/no question, answer '
        '"yes", "no", or "unanswerable". Do not provide any explanation.\n\nArticle: {context}\n\n Answer '
        "the question based on the above article as concisely as you can, using a single phrase or sentence "
        "if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not '
        "provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
    ),
    "hotpotqa": (
        "Answer the question based on the given passages. Only give me the answer and do not output any "
        "other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the "
        "given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\n"
        "Answer:"
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the "
        "query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the "
        "above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}"
    ),
    "lcc": ("Please complete the code given below. \n{context}Next line of code:\n"),
}
PROMPTS["2wikimqa"] = PROMPTS["hotpotqa"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def line(dataset, **changes):
    return {
        "input": "Who {came}?",
        "context": "Anne came. {Braces} stay.",
        "answers": ["Anne", "Anne Shirley"],
        "length": 4,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": f"id of {dataset}",
    } | changes


def written(path, *lines):
    path.write_text("".join(text if isinstance(text, str) else json.dumps(text) + "\n" for text in lines))
    return path


@pytest.mark.parametrize("dataset", PROMPTS)
def test_prompts_are_the_published_ones(tmp_path, tokenizer, dataset):
    (example,) = read_longbench(written(tmp_path / "file.jsonl", line(dataset)), tokenizer)
    expected = PROMPTS[dataset].replace("{context}", line(dataset)["context"]).replace("{input}", "Who {came}?")
    assert example.prompt == expected
    assert example.context.endswith("stay.")  # all that follows is read after compression
    assert example.id == f"{dataset} id of {dataset}" and example.references == ("Anne", "Anne Shirley")


def test_the_papers_sets_have_their_scores_and_lengths():
    expected = {
        "narrativeqa": (128, "token_f1"),
        "qasper": (128, "token_f1"),
        "hotpotqa": (32, "token_f1"),
        "2wikimqa": (32, "token_f1"),
        "qmsum": (512, "rouge_l"),
    }
    assert {name: (LONGBENCH[name].max_new_tokens, LONGBENCH[name].scorer) for name in OF_THE_PAPER} == expected
    assert all(entry.scorer in SCORERS for entry in LONGBENCH.values())


def test_classes_go_along_to_be_scored(tmp_path, tokenizer):
    trec = line("trec", answers=["Other number"], all_classes=["Food", "Other number"])
    (example,) = read_longbench(written(tmp_path / "file.jsonl", trec), tokenizer)
    assert score(example, "Other number\nQuestion") == 100 and score(example, "Food or Other number") == 50


@pytest.mark.parametrize("n_tokens", [300, 400, 1000])
def test_the_middle_of_a_long_context_is_cut_out(tmp_path, tokenizer, n_tokens):
    context = " ".join(f"Sentence {i} of the story." for i in range(150))
    path = written(tmp_path / "file.jsonl", line("narrativeqa", context=context))
    (whole,), (short,) = read_longbench(path, tokenizer), read_longbench(path, tokenizer, n_tokens=n_tokens)
    n = len(tokenizer(short.context).input_ids) + short.max_new_tokens
    n += len(tokenizer(short.question + short.answer_prefix, add_special_tokens=False).input_ids)
    assert n_tokens - 3 <= n <= n_tokens
    before = PROMPTS["narrativeqa"].split("{context}")[0]
    kept = short.context.removeprefix(before)
    assert whole.context == before + context and short.context.startswith(before) and short.question == whole.question
    half = len(kept) // 2
    assert context.startswith(kept[: len(kept) - half]) and context.endswith(kept[len(kept) - half :])


def test_a_context_that_fits_stays_as_it_is(tmp_path, tokenizer):
    path = written(tmp_path / "file.jsonl", line("hotpotqa"))
    assert read_longbench(path, tokenizer, n_tokens=5000) == read_longbench(path, tokenizer)
    with pytest.raises(TextError, match="hotpotqa needs at least"):
        read_longbench(path, tokenizer, n_tokens=50)


def without(dataset, field):
    return {name: value for name, value in line(dataset).items() if name != field}


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (without("qmsum", "answers"), "line 2: Object missing required field `answers`"),
        (line("qmsum", answers="Anne"), r"line 2: Expected `array`, got `str` - at `\$.answers`"),
        (line("qmsum", answers=[]), "example 1: it has no right answer"),
        (line("trec"), "example 1: it has no classes to choose from"),
        (line("passage_retrieval_en"), "example 1: a right answer names no paragraph"),
        (line("vcsum"), "example 1: `dataset` must be one of .*'vcsum'. Chinese sets"),
        ('{"input": "cut o', "line 2: Input data was truncated"),
    ],
)
def test_malformed_lines_are_refused_with_place_and_reason(tmp_path, tokenizer, second, reason):
    with pytest.raises(RecordError, match=reason):
        read_longbench(written(tmp_path / "file.jsonl", line("qmsum"), second), tokenizer)


def choice(**changes):
    return {
        "_id": "66f",
        "domain": "Single-Document QA",
        "sub_domain": "Literary",
        "difficulty": "hard",
        "length": "short",
        "question": " What colour is the house? ",
        "choice_A": "Red",
        "choice_B": "Green",
        "choice_C": "Blue",
        "choice_D": "None of these",
        "answer": "B",
        "context": "The house is green.\n",
    } | changes


def test_version_2_is_put_as_published_and_scored_by_its_letter(tmp_path, tokenizer):
    path = written(tmp_path / "data.json", [choice(), choice(_id="67a", answer="C")])
    first, second = read_longbench2(path, tokenizer)
    assert first.prompt == (
        "Please read the following text and answer the question below.\n\n<text>\nThe house is green.\n</text>\n\n"
        "What is the correct answer to this question: What colour is the house?\nChoices:\n"
        "(A) Red\n(B) Green\n(C) Blue\n(D) None of these\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert first.context.endswith("green.") and second.id == "longbench2 67a"
    assert score(first, "The correct answer is (B)") == 100 and score(second, "The correct answer is (B)") == 0
    assert first.labels["difficulty"] == "hard" and first.labels["length"] == "short"


def test_the_answer_of_version_2_can_be_begun(tmp_path, tokenizer):
    (example,) = read_longbench2(written(tmp_path / "data.json", [choice()]), tokenizer, begun=True)
    assert example.prompt.endswith("The correct answer is (") and example.max_new_tokens == 4
    assert score(example, "B)") == 100


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([choice(), choice(answer="E")], "item 1: Invalid enum value 'E'"),
        ([choice(), {"_id": "x"}], "item 1: Object missing required field"),
        (["nonsense"], "item 0: Expected `object`, got `str`"),
        ([], "no examples"),
    ],
)
def test_items_of_version_2_that_are_none_are_refused(tmp_path, tokenizer, items, reason):
    with pytest.raises(RecordError, match=reason):
        read_longbench2(written(tmp_path / "data.json", items), tokenizer)


def test_json_that_is_none_is_refused(tmp_path, tokenizer):
    with pytest.raises(RecordError, match="is not JSON"):
        read_longbench2(written(tmp_path / "data.json", "[{"), tokenizer)
    with pytest.raises(TextError, match="cannot be read"):
        read_longbench2(tmp_path / "none.json", tokenizer)
