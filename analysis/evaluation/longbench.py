"""Examples from LongBench's files: the English sets of version 1 with their own prompts, and version 2.

Prompts, lengths of answers and scores are LongBench's (github.com/THUDM/LongBench, `config` and `eval.py`; arXiv
2308.14508 and 2412.15204). What differs: the instruction after the context is read after compression, as the question
is; and of a context that is too long the middle is cut out of the context alone, so that instructions stay as they are.
Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from analysis.errors import RecordError
from analysis.evaluation.examples import Example, count_tokens, fill, read_items
from analysis.evaluation.scoring import check_scorable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_THE_PAPER = ("narrativeqa", "qasper", "hotpotqa", "2wikimqa", "qmsum")
"""The sets that the paper measured."""


@dataclass(frozen=True, slots=True)
class LongBenchSet:
    """Prompt and scorer of a set of LongBench v1."""

    before: str
    """Instruction before the context."""
    after: str
    """Text after the context, around {input}."""
    answer_prefix: str
    max_new_tokens: int
    scorer: str


def read_longbench(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, n_tokens: int | None = None
) -> tuple[Example, ...]:
    """Read a file of LongBench v1: JSON lines of `input`, `context`, `answers`, `dataset`, `all_classes`, `_id`, ...

    Args:
        n_tokens: most tokens of an example, those to generate included; None leaves contexts as they are.

    Raises:
        RecordError: a line is malformed, has no answer, or belongs to a set not in `LONGBENCH`; the message says which.
        TextError: the file cannot be read, or `n_tokens` are too few.
    """
    examples = []
    for number, line in read_items(path, _Line):
        before, example = _of_line(f"{path}, example {number}", number, line)
        examples.append(_shortened(before, example, tokenizer, n_tokens))
    return tuple(examples)


def read_longbench2(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, n_tokens: int | None = None, begun: bool = False
) -> tuple[Example, ...]:
    """Read LongBench v2's file: JSON of `question`, `choice_A` to `choice_D`, `answer`, `context`, `_id`, ...

    Args:
        n_tokens: as in `read_longbench`.
        begun: begin the answer with "The correct answer is (", so that its letter comes next. In LongBench the model
            writes all of it.

    Raises:
        RecordError: an item is malformed; the message says which.
        TextError: the file cannot be read, or `n_tokens` are too few.
    """
    return tuple(
        _shortened(_BEFORE_CHOICE, _of_choice(item, begun), tokenizer, n_tokens)
        for _, item in read_items(path, _Choice)
    )


class _Line(msgspec.Struct):
    input: str
    context: str
    answers: list[str]
    dataset: str
    id: str = msgspec.field(name="_id", default="")
    length: int = 0
    language: str = ""
    all_classes: list[str] | None = None


class _Choice(msgspec.Struct):
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str
    id: str = msgspec.field(name="_id")
    domain: str = ""
    sub_domain: str = ""
    difficulty: str = ""
    length: str = ""


def _of_line(where: str, number: int, line: _Line) -> tuple[str, Example]:
    """The instruction that an example begins with, and the example."""
    task = line.dataset.removesuffix("_e")  # LongBench-E has the same sets, by length
    if task not in LONGBENCH:
        raise RecordError(
            f"{where}: `dataset` must be one of {', '.join(LONGBENCH)}, got {line.dataset!r}. Chinese sets are scored "
            "by words that a segmenter must find, and there is none here."
        )
    put = LONGBENCH[task]
    example = Example(
        f"{task} {line.id or number}",
        task,
        put.before + line.context,
        put.after.format(input=line.input),
        put.answer_prefix,
        tuple(line.answers),
        put.max_new_tokens,
        put.scorer,
        tuple(line.all_classes or ()),
        {"language": line.language, "words": line.length},
    )
    return put.before, check_scorable(example, where)


def _of_choice(item: _Choice, begun: bool) -> Example:
    choices = "\n".join(f"({letter}) {getattr(item, f'choice_{letter}').strip()}" for letter in "ABCD")
    return Example(
        f"longbench2 {item.id}",
        "longbench2",
        _BEFORE_CHOICE + item.context.strip(),
        f"\n</text>\n\nWhat is the correct answer to this question: {item.question.strip()}\nChoices:\n{choices}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".',
        "\n\nThe correct answer is (" if begun else "",
        (item.answer,),
        4 if begun else 128,
        "choice",
        labels={
            "domain": item.domain,
            "sub_domain": item.sub_domain,
            "difficulty": item.difficulty,
            "length": item.length,
        },
    )


def _shortened(before: str, example: Example, tokenizer: PreTrainedTokenizerBase, n_tokens: int | None) -> Example:
    """The example with the middle of its context, but for the instruction before it, cut out as far as needed."""
    if n_tokens is None or (counted := count_tokens(tokenizer, example)) <= n_tokens:
        return example
    whole = example.context[len(before) :]

    def make(characters: int) -> Example:
        end = characters // 2
        return replace(example, context=before + whole[: characters - end] + whole[len(whole) - end :])

    guess = len(whole) * n_tokens // counted
    return fill(tokenizer, make, n_tokens=n_tokens, least=0, guess=guess, most=len(whole))[0]


_BEFORE_CHOICE = "Please read the following text and answer the question below.\n\n<text>\n"
_BRIEFLY = "Only give me the answer and do not output any other words."
_PASSAGES = f"Answer the question based on the given passages. {_BRIEFLY}"
_OF_PASSAGES = LongBenchSet(
    f"{_PASSAGES}\n\nThe following are given passages.\n",
    f"\n\n{_PASSAGES}\n\nQuestion: {{input}}\n",
    "Answer:",
    32,
    "token_f1",
)
_PHRASE = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_SENTENCE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
_CODE = "Please complete the code given below. \n"

LONGBENCH: Mapping[str, LongBenchSet] = {
    "narrativeqa": LongBenchSet(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"Answer the question {_PHRASE}\n\nStory: ",
        f"\n\nNow, answer the question based on the story {_PHRASE}\n\nQuestion: {{input}}\n\n",
        "Answer:",
        128,
        "token_f1",
    ),
    "qasper": LongBenchSet(
        f"You are given a scientific article and a question. Answer the question {_SENTENCE}\n\nArticle: ",
        f"\n\n Answer the question based on the above article {_SENTENCE}\n\nQuestion: {{input}}\n\n",
        "Answer:",
        128,
        "token_f1",
    ),
    "hotpotqa": _OF_PASSAGES,
    "2wikimqa": _OF_PASSAGES,
    "qmsum": LongBenchSet(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n",
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n",
        "Answer:",
        512,
        "rouge_l",
    ),
    "musique": _OF_PASSAGES,
    "multifieldqa_en": LongBenchSet(
        "Read the following text and answer briefly.\n\n",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\n",
        "Answer:",
        64,
        "token_f1",
    ),
    "gov_report": LongBenchSet(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n",
        "\n\nNow, write a one-page summary of the report.\n\n",
        "Summary:",
        512,
        "rouge_l",
    ),
    "multi_news": LongBenchSet(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\nNow, write a one-page summary of all the news.\n\n",
        "Summary:",
        512,
        "rouge_l",
    ),
    "trec": LongBenchSet(
        "Please determine the type of the question below. Here are some examples of questions.\n\n",
        "\n{input}",
        "",
        64,
        "classification",
    ),
    "triviaqa": LongBenchSet(
        f"Answer the question based on the given passage. {_BRIEFLY} The following are some examples.\n\n",
        "\n\n{input}",
        "",
        32,
        "token_f1_line",
    ),
    "samsum": LongBenchSet(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\n{input}",
        "",
        128,
        "rouge_l_line",
    ),
    "passage_count": LongBenchSet(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n",
        "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\n",
        "The final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": LongBenchSet(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n",
        "\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract "
        'is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n',
        "The answer is: ",
        32,
        "retrieval",
    ),
    "lcc": LongBenchSet(_CODE, "", "Next line of code:\n", 64, "code_similarity"),
    "repobench-p": LongBenchSet(_CODE, "{input}", "Next line of code:\n", 64, "code_similarity"),
}
"""LongBench v1's English sets by name."""
