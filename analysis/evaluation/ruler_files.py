"""Readers of RULER's files, and of the questions that two of its tasks need. Knows no model and no tokenizer."""

from __future__ import annotations

from pathlib import Path

import msgspec

from analysis.errors import RecordError
from analysis.evaluation.examples import Example, read_items
from analysis.evaluation.ruler import RULER, Asked, Prompt, Questions, example_of
from analysis.evaluation.scoring import check_scorable
from analysis.texts.read import read_text


def read_ruler(path: str | Path, task: str | None = None) -> tuple[Example, ...]:
    """Read examples from a file that RULER's `prepare.py` wrote: JSON lines of `input`, `outputs`, `answer_prefix`, ...

    The input holds context and question in one string, and is split where the task's question begins; in older files
    it ends with the answer's prefix, too.

    Args:
        task: task of the file; None takes the folder's name, as RULER has it ("niah_single_1/validation.jsonl").

    Raises:
        SettingsError: the task is unknown.
        RecordError: a line is malformed, or holds no question of the task; the message says which.
        TextError: the file cannot be read.
    """
    path = Path(path)
    task = path.parent.name if task is None else task
    return tuple(_read_line(path, task, number, line) for number, line in read_items(path, _Line))


def read_questions(path: str | Path) -> Questions:
    """Read questions about documents from SQuAD's JSON (2.0 or 1.1) or HotpotQA's. Raises RecordError or TextError."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            read = _hotpot(msgspec.json.decode(text, type=list[_HotpotItem]))
        else:
            read = _squad(msgspec.json.decode(text, type=_SquadFile))
    except msgspec.DecodeError as error:
        raise RecordError(f"{path} is neither SQuAD's JSON nor HotpotQA's: {error}.") from error
    if not read.asked:
        raise RecordError(f"{path} holds no question that has an answer.")
    return read


class _Line(msgspec.Struct):
    input: str
    outputs: list[str]
    answer_prefix: str = ""


class _HotpotItem(msgspec.Struct):
    question: str
    answer: str
    context: list[tuple[str, list[str]]]


class _SquadAnswer(msgspec.Struct):
    text: str


class _SquadQuestion(msgspec.Struct):
    question: str
    answers: list[_SquadAnswer]
    is_impossible: bool = False


class _SquadParagraph(msgspec.Struct):
    context: str
    qas: list[_SquadQuestion]


class _SquadArticle(msgspec.Struct):
    paragraphs: list[_SquadParagraph]


class _SquadFile(msgspec.Struct):
    data: list[_SquadArticle]


def _read_line(path: Path, task: str, number: int, line: _Line) -> Example:
    entry = RULER.find(task)
    where = f"{path}, example {number}"
    begins = [match.start() for match in entry.question.finditer(line.input)]
    if not begins:
        raise RecordError(f"{where}: `input` holds no question of {task} ({entry.question.pattern!r}). Name its task.")
    context, question, prefix = line.input[: begins[-1]], line.input[begins[-1] :], line.answer_prefix
    if not prefix:
        answer = entry.answer.search(question)
        if answer is None:
            raise RecordError(f"{where}: there is no `answer_prefix`, nor does `input` end with one of {task}.")
        question, prefix = question[: answer.start()], question[answer.start() :]
    example = example_of(f"{task} {path.stem} {number}", task, Prompt(context, question, prefix, line.outputs), {})
    return check_scorable(example, where)


def _squad(read: _SquadFile) -> Questions:
    documents = sorted({paragraph.context for article in read.data for paragraph in article.paragraphs})
    index = {document: i for i, document in enumerate(documents)}
    asked = []
    for article in read.data:
        near = dict.fromkeys(index[paragraph.context] for paragraph in article.paragraphs)
        for paragraph in article.paragraphs:
            own = index[paragraph.context]
            others = tuple(i for i in near if i != own)
            for each in paragraph.qas:
                answers = tuple(answer.text for answer in each.answers if answer.text.strip())
                if answers and not each.is_impossible:
                    asked.append(Asked(each.question, answers, (own,), others))
    return Questions(tuple(documents), tuple(asked))


def _hotpot(read: list[_HotpotItem]) -> Questions:
    def texts(item: _HotpotItem) -> list[str]:
        return [f"{title}\n{''.join(lines)}" for title, lines in item.context]

    documents = sorted({text for item in read for text in texts(item)})
    index = {document: i for i, document in enumerate(documents)}
    asked = [
        Asked(item.question, (item.answer,), tuple(dict.fromkeys(index[text] for text in texts(item))))
        for item in read
        if item.answer.strip()
    ]
    return Questions(tuple(documents), tuple(asked))
