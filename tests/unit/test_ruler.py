"""RULER's tasks: each example is solved from its own text, by a program that knows the templates alone."""

import json
import re
from collections import Counter
from itertools import combinations

import pytest
from transformers import AutoTokenizer

from analysis.errors import RecordError, SettingsError, TextError
from analysis.evaluation.examples import count_tokens, largest, sentences
from analysis.evaluation.ruler import OFFLINE, RULER, ruler_examples
from analysis.evaluation.ruler_files import read_questions, read_ruler
from analysis.evaluation.wordlist import ADJECTIVES, NOUNS, VERBS
from analysis.models.packaged import SMOLLM2, folder_of
from tests.support.paths import BUNDLED

N_TOKENS = 1000
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NIAH = [task for task in OFFLINE if task.startswith("niah")]
HEAD = "Below is a numbered list of words. In these words, some appear more often than others."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def made(tokenizer):
    """Three examples of each of the eleven tasks."""
    return {task: ruler_examples(tokenizer, task, n_tokens=N_TOKENS, n_samples=3) for task in OFFLINE}


def solved(example):
    """What the text says, found without the program that made it."""
    text = example.prompt
    if example.task.startswith("niah"):
        held = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", text)
        asked = re.search(r"for (.*) mentioned in", example.question)[1].replace(", and ", ", ").split(", ")
        return {value for _, key, value in held if key in asked}
    if example.task == "vt":
        real = text[text.rindex("Memorize and track") :]
        value = re.search(r"assigned the value (\d+) in the text", real)[1]
        found, before = [], value
        while step := re.search(rf"VAR (\w+) = (?:VAR )?{before}\b", real):
            found.append(before := step[1])
        return set(found)
    if example.task == "cwe":
        words = re.findall(r"\d+\. (\w+)", text[text.rindex(HEAD) :])
        return {word for word, _ in Counter(words).most_common(10)}
    words = text.split("Find the three most frequently appeared coded words. ")[1].split("\nQuestion:")[0].split()
    return {word for word, _ in Counter(word for word in words if word != "...").most_common(3)}


@pytest.mark.parametrize("task", OFFLINE)
def test_the_text_holds_the_answer_and_no_other(made, task):
    for example in made[task]:
        assert solved(example) == set(example.references)
        assert len(set(example.references)) == len(example.references)
        assert not any(answer in example.question + example.answer_prefix for answer in example.references)


@pytest.mark.parametrize("task", OFFLINE)
def test_no_example_is_longer_than_asked_and_none_is_much_shorter(made, tokenizer, task):
    longest_unit = 90 if task == "niah_multikey_3" else 30  # tokens of a line, the least that can be added
    for example in made[task]:
        n = len(tokenizer(example.context).input_ids) + RULER[task].max_new_tokens
        n += len(tokenizer(example.question + example.answer_prefix, add_special_tokens=False).input_ids)
        assert N_TOKENS - longest_unit <= n <= N_TOKENS


@pytest.mark.parametrize("task", OFFLINE)
def test_lengths_are_by_the_models_own_tokenizer(task):
    folder = folder_of(SMOLLM2)
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("smollm2 is not on this machine")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for example in ruler_examples(tokenizer, task, n_tokens=N_TOKENS, n_samples=2):
        assert 0.95 * N_TOKENS <= count_tokens(tokenizer, example) <= N_TOKENS
        assert solved(example) == set(example.references)


@pytest.mark.parametrize("task", OFFLINE)
def test_a_seed_makes_the_same_examples_and_more_begin_with_them(made, tokenizer, task):
    fewer = ruler_examples(tokenizer, task, n_tokens=N_TOKENS, n_samples=1)
    assert fewer == made[task][:1]
    assert ruler_examples(tokenizer, task, n_tokens=N_TOKENS, n_samples=1, seed=1) != fewer
    assert len({example.context for example in made[task]}) == len({example.id for example in made[task]}) == 3


def test_tokens_to_generate_are_rulers():
    tokens = {task.split("_")[0]: entry.max_new_tokens for task, entry in RULER.items()}
    assert tokens == {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert len(OFFLINE) == 11 and set(RULER) - set(OFFLINE) == {"qa_1", "qa_2"}


@pytest.mark.parametrize(
    ("task", "needles", "answers", "what"),
    [
        ("niah_single_1", 1, 1, "number"),
        ("niah_single_2", 1, 1, "number"),
        ("niah_single_3", 1, 1, "uuid"),
        ("niah_multikey_1", 4, 1, "number"),
        ("niah_multivalue", 4, 4, "numbers"),
        ("niah_multiquery", 4, 4, "numbers"),
    ],
)
def test_needles_are_as_many_as_ruler_hides_and_asked_for_in_its_words(made, task, needles, answers, what):
    many = what.endswith("s")
    for example in made[task]:
        assert example.context.count("One of the special magic") == needles
        assert len(example.references) == answers
        keys = re.search(r"for (.*) mentioned", example.question)[1]
        verb, all_, some = ("are", "are all", "Some") if many else ("is", "is", "A")
        assert example.question == f"What {all_} the special magic {what} for {keys} mentioned in the provided text?"
        assert example.answer_prefix == f" The special magic {what} for {keys} mentioned in the provided text {verb}"
        assert example.context.startswith(
            f"{some} special magic {what} {verb} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what} afterwards.\n"
        )
        assert example.context.endswith("\n")
        kind = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if "uuid" in what else r"[1-9]\d{6}"
        assert all(re.fullmatch(kind, answer) for answer in example.references)


def test_haystacks_are_noise_essay_or_needles(made):
    for example in made["niah_single_1"]:
        lines = example.context.splitlines()[1:]
        assert lines.count(NOISE) == len(lines) - 1
    for task, key in (("niah_multikey_2", r"[a-z]+-[a-z]+"), ("niah_multikey_3", r"[0-9a-f-]{36}")):
        for example in made[task]:
            lines = example.context.splitlines()[1:]
            found = [re.fullmatch(rf"One of the special magic \w+ for ({key}) is: (\S+)\.", line) for line in lines]
            assert all(found) and len({match[1] for match in found}) == len({match[2] for match in found}) == len(lines)


def test_the_essay_is_any_text_and_needles_stand_between_its_sentences(tokenizer):
    essay = " ".join(f"Sentence number {i} of the essay is this one." for i in range(40))
    for example in ruler_examples(tokenizer, "niah_multivalue", n_tokens=N_TOKENS, n_samples=4, essay=essay):
        rest = re.sub(r"One of the special magic \S+ for \S+ is: \d+\. ?", "", example.context.split("\n")[1])
        whole = re.findall(r"Sentence number \d+ of the essay is this one\.", rest)
        assert rest.startswith(" ".join(whole))  # what is left over is cut off at its end
        numbers = [int(re.search(r"\d+", sentence)[0]) for sentence in whole]
        assert numbers == [(numbers[0] + i) % 40 for i in range(len(numbers))]  # begun anywhere, and repeated
        assert numbers[0] != 0 or example.id.endswith(" 0")


def test_depth_is_the_share_of_the_context_before_the_needle(made):
    for task in NIAH:
        for example in made[task]:
            if len(example.references) == 1:
                before, after = example.context.split(example.references[0])
                assert example.labels["depth"] == len(before) / len(example.context) and after
            else:
                assert example.labels == {"n_tokens": N_TOKENS}


def test_variable_tracking_shows_a_solved_example_first(made, tokenizer):
    for example in made["vt"]:
        shown, real = example.context.split("\n\nMemorize and track")
        shown_task = example.__class__("", "vt", shown, "", "", (), 30, "")
        names = shown.split("they are:  ")[1].split()
        assert solved(shown_task) == set(names) and [len(name) for name in names] == [3] * 5
        assert len(tokenizer(shown).input_ids) <= N_TOKENS // 2 + 1
        order = [real.index(f"VAR {name} =") for name in example.references]
        assert order == sorted(order) and [len(name) for name in example.references] == [5] * 5
        assert re.fullmatch(
            r" Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are "
            r"assigned the value \d{5}, they are: ",
            example.answer_prefix,
        )


@pytest.mark.parametrize(("n_tokens", "shown", "real"), [(N_TOKENS, (3, 1), (6, 1)), (4096, (10, 3), (30, 3))])
def test_common_words_are_repeated_as_often_as_in_ruler(tokenizer, n_tokens, shown, real):
    (example,) = ruler_examples(tokenizer, "cwe", n_tokens=n_tokens, n_samples=1)
    lists = [re.findall(r"(\d+)\. (\w+)", part.split("\nQuestion:")[0]) for part in example.context.split(HEAD)[1:]]
    assert len(lists) == 2 and "top 10 words that appear most often in the list are: 1. " in example.context
    for numbered, (often, seldom) in zip(lists, (shown, real), strict=True):
        assert [int(place) for place, _ in numbered] == list(range(1, len(numbered) + 1))
        counts = Counter(Counter(word for _, word in numbered).values())
        assert set(counts) == {often, seldom} and counts[often] == 10


def test_more_words_than_the_list_has_are_made_of_two(tokenizer):
    (example,) = ruler_examples(tokenizer, "cwe", n_tokens=34_000, n_samples=1)
    words = {*re.findall(r"\d+\. (\w+)", example.context)}
    assert words > {*ADJECTIVES, *NOUNS, *VERBS} and count_tokens(tokenizer, example) > 33_660
    made_up = words - {*ADJECTIVES, *NOUNS, *VERBS}
    assert all(any(word.removeprefix(noun) in NOUNS for noun in NOUNS) for word in made_up)
    assert solved(example) == set(example.references)


def test_frequent_words_fall_by_the_square_of_their_rank(made):
    for example in made["fwe"]:
        words = example.context.split("coded words. ")[1].split()
        counts = [n for _, n in Counter(words).most_common()]
        assert words.count("...") == counts[0]
        for rank, n in enumerate(counts, 1):
            assert n == pytest.approx(counts[0] / rank**2, abs=1)


def test_no_word_is_part_of_another():
    words = ADJECTIVES + NOUNS + VERBS
    assert len(set(words)) == len(words)
    assert not [pair for pair in combinations(words, 2) if pair[0] in pair[1] or pair[1] in pair[0]]


@pytest.mark.parametrize("task", OFFLINE)
def test_too_few_tokens_are_refused_with_the_number_that_is_needed(tokenizer, task):
    with pytest.raises(TextError, match=rf"{task} needs at least \d+ tokens .* got 150") as refused:
        ruler_examples(tokenizer, task, n_tokens=150, n_samples=1)
    if task not in ("vt", "fwe"):  # whose least size falls with the number asked for
        needed = int(re.search(r"at least (\d+)", str(refused.value))[1])
        assert ruler_examples(tokenizer, task, n_tokens=needed, n_samples=1)


def test_what_there_is_not_is_refused(tokenizer):
    with pytest.raises(SettingsError, match=r"Did you mean 'niah_multiquery'\?"):
        ruler_examples(tokenizer, "niah_multiqueries", n_tokens=N_TOKENS, n_samples=1)
    with pytest.raises(SettingsError, match="questions"):
        ruler_examples(tokenizer, "qa_1", n_tokens=N_TOKENS, n_samples=1)
    with pytest.raises(TextError, match="empty"):
        ruler_examples(tokenizer, "niah_single_2", n_tokens=N_TOKENS, n_samples=1, essay=" ")


def squad_file(folder):
    paragraphs = [
        {
            "context": f"Paragraph {i} says that the colour of house {i} is shade {i}.",
            "qas": [
                {
                    "id": "q",
                    "question": f"Which colour has house {i}?",
                    "answers": [{"text": f"shade {i}"}, {"text": f"{i}"}],
                },
                {"id": "n", "question": "Who?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(40)
    ]
    data = [{"title": "Even", "paragraphs": paragraphs[::2]}, {"title": "Odd", "paragraphs": paragraphs[1::2]}]
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def hotpot_file(folder):
    items = [
        {
            "_id": str(i),
            "question": f"Which shade has the house of person {i}?",
            "answer": f"shade {i}",
            "context": [
                [f"Person {i}", [f"Person {i} lives in house {i}.", " It is old."]],
                [f"House {i}", [f"House {i} has shade {i}."]],
            ],
        }
        for i in range(20)
    ]
    path = folder / "hotpot.json"
    path.write_text(json.dumps(items))
    return path


def test_questions_of_squad_stand_among_documents_of_their_article_first(tmp_path, tokenizer):
    questions = read_questions(squad_file(tmp_path))
    assert len(questions.documents) == len(questions.asked) == 40  # none of the impossible ones
    examples = ruler_examples(tokenizer, "qa_1", n_tokens=600, n_samples=3, questions=questions)
    assert len({example.question for example in examples}) == 3
    for example in examples:
        i = int(re.search(r"\n\nQuestion: Which colour has house (\d+)\?$", example.question)[1])
        assert example.references == (f"shade {i}", str(i)) and example.scorer == "string_match_part"
        listed = re.findall(r"Document (\d+):\nParagraph (\d+) says", example.context)
        assert [int(place) for place, _ in listed] == list(range(1, len(listed) + 1)) and len(listed) > 5
        assert str(i) in {house for _, house in listed}
        assert len(listed) < 20 and all(int(house) % 2 == i % 2 for _, house in listed)  # of its own article


def test_more_documents_than_there_are_come_again(tmp_path, tokenizer):
    questions = read_questions(squad_file(tmp_path))
    (example,) = ruler_examples(tokenizer, "qa_1", n_tokens=4000, n_samples=1, questions=questions)
    assert example.context.count("Document ") > 40


def test_questions_of_hotpot_bring_all_documents_they_need(tmp_path, tokenizer):
    questions = read_questions(hotpot_file(tmp_path))
    for example in ruler_examples(tokenizer, "qa_2", n_tokens=500, n_samples=3, questions=questions):
        number = int(re.search(r"person (\d+)", example.question)[1])
        assert f"Person {number}\nPerson {number} lives in house {number}. It is old." in example.context
        assert f"House {number}\nHouse {number} has shade {number}." in example.context
        assert example.references == (f"shade {number}",)
        assert example.context.startswith(
            "Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words.\n\nThe following are given documents.\n\nDocument 1:\n"
        )


def test_files_of_questions_that_are_none_are_refused(tmp_path):
    path = tmp_path / "questions.json"
    for text, reason in (
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "context"),
        ('[{"question": "Who?"}]', "answer"),
        ("{", "neither"),
        ('{"data": []}', "no question"),
    ):
        path.write_text(text)
        with pytest.raises(RecordError, match=reason):
            read_questions(path)


def as_ruler_writes(example, *, with_prefix_field=True):
    line = {
        "index": 7,
        "input": example.context + example.question,
        "outputs": list(example.references),
        "length": 1000,
    }
    if with_prefix_field:
        return line | {"length_w_model_temp": 1000, "answer_prefix": example.answer_prefix, "token_position_answer": 3}
    return line | {"input": example.prompt}  # as it was written before the prefix had a field


@pytest.mark.parametrize("with_prefix_field", [True, False])
@pytest.mark.parametrize("task", OFFLINE)
def test_rulers_own_files_are_split_at_the_question(made, tmp_path, task, with_prefix_field):
    path = tmp_path / task / "validation.jsonl"
    path.parent.mkdir()
    lines = [as_ruler_writes(example, with_prefix_field=with_prefix_field) for example in made[task]]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    for read, example in zip(read_ruler(path), made[task], strict=True):
        assert (read.context, read.question, read.answer_prefix) == (
            example.context,
            example.question,
            example.answer_prefix,
        )
        assert (read.references, read.max_new_tokens, read.scorer) == (
            example.references,
            example.max_new_tokens,
            example.scorer,
        )
        assert {**read.labels, "n_tokens": N_TOKENS} == example.labels and read.task == task


def test_a_prompt_on_one_line_is_split_too(made, tmp_path):
    """RULER can write prompts without line ends."""
    path = tmp_path / "vt.jsonl"
    example = made["vt"][0]
    line = as_ruler_writes(example) | {"input": " ".join((example.context + example.question).split())}
    path.write_text(json.dumps(line))
    (read,) = read_ruler(path, "vt")
    assert read.question == example.question and read.context.endswith("There and back again. ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "Who?", "outputs": ["a"]}', r"example 1: `input` holds no question of vt"),
        (
            '{"input": "ASK", "outputs": ["a"]}',
            "no `answer_prefix`",
        ),
        ('{"input": "ASK", "outputs": [], "answer_prefix": "A"}', "example 1: it has no right answer"),
        ('{"input": "ASK", "outputs": [" "], "answer_prefix": "A"}', "right answer is empty"),
        ('{"input": "Who?"}', "line 3: Object missing required field `outputs`"),
        ('{"input": 3, "outputs": ["a"]}', r"line 3: Expected `str`, got `int` - at `\$.input`"),
        ("nonsense", "line 3: JSON is malformed"),
    ],
)
def test_lines_that_are_not_rulers_are_refused_with_place_and_reason(made, tmp_path, line, reason):
    path = tmp_path / "validation.jsonl"
    line = line.replace("ASK", "Question: Find all variables that are assigned the value 1")
    path.write_text(f"{json.dumps(as_ruler_writes(made['vt'][0]))}\n\n{line}\n")
    with pytest.raises(RecordError, match=reason):
        read_ruler(path, "vt")


def test_files_that_are_not_there_or_of_no_task_are_refused(tmp_path):
    with pytest.raises(TextError, match="cannot be read"):
        read_ruler(tmp_path / "none.jsonl", "vt")
    path = tmp_path / "validation.jsonl"
    path.write_text("\n")
    with pytest.raises(RecordError, match="no examples"):
        read_ruler(path, "vt")
    path.write_text('{"input": "a", "outputs": ["b"]}')
    with pytest.raises(SettingsError, match="RULER task must be one of"):
        read_ruler(path)  # its folder is no task


def test_the_largest_that_fits_is_found_from_any_guess():
    for limit in (3, 4, 5, 17, 100):
        for guess in (0, 3, 4, 16, 17, 18, 50, 1000):
            assert largest(lambda size, limit=limit: size <= limit, least=3, guess=guess) == limit
            for most in (3, 10, 17, 100):
                found = largest(lambda size, limit=limit: size <= limit, least=3, guess=guess, most=most)
                assert found == min(limit, most)


def test_sentences_end_where_a_reader_ends_them():
    text = 'Mr. X. Y. Zed came.  "Why?" he\nasked. Dots . . . but no more! End'
    assert sentences(text) == ["Mr. X. Y. Zed came.", '"Why?"', "he asked.", "Dots . . .", "but no more!", "End"]
    assert " ".join(sentences(text)) == " ".join(text.split())
