"""Questions to a model, through its chat template or as plain text, and whether an answer is right.

Knows tokenizers and text; knows no model.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import TextError
from analysis.evaluation.task import Scoring
from analysis.texts.tokens import Tokens, check_text, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def found(answer: str, text: str) -> bool:
    """Tell whether a generated text gives the expected answer: the rule of presets, the page Generate and the passkeys.

    A key of digits is found where the first digits of the text begin with it, wherever they stand ("48213", "The pass
    key is 48213."); other answers where the text holds them, whatever the case of letters ("paris" in "It is Paris.").

    Raises:
        ValueError: there is no answer to expect.
    """
    if not answer.strip():
        raise ValueError("a task needs the answer that is expected")
    answer = answer.strip()
    if answer.isdecimal():
        digits = re.search(r"\d+", text)
        return digits is not None and digits[0].startswith(answer)
    return answer.casefold() in text.casefold()


def decided(answer: str, text: str) -> bool:
    """Tell whether `found` can no longer change, however the text continues."""
    if found(answer, text):
        return True
    answer, digits = answer.strip(), re.search(r"\d+", text)
    if not answer.isdecimal() or digits is None:
        return False
    ended = digits.end() < len(text)
    return ended or not answer.startswith(digits[0])


FOUND = Scoring(
    lambda sample, text: float(found(sample.answer, text)), lambda sample, text: decided(sample.answer, text)
)
"""1 where the answer is `found`, else 0."""


def can_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Apply the chat template to a user's question, with the template's own system message if it has one.

    Raises:
        TextError: the question is empty or no valid Unicode, or the tokenizer has no template that takes it.
    """
    check_text(question)
    return _templated(tokenizer, [{"role": "user", "content": question}])


def next_turn_ids(tokenizer: PreTrainedTokenizerBase, message: str) -> np.ndarray:
    """Tokens [n] int64 of a chat from the end of an answer to the beginning of the next one, a user's message between.

    The first of them ends the answer before. Raises TextError, as `chat_text`, or of a template for one message only.
    """
    check_text(message)
    talk = (("user", "?"), ("assistant", _ANSWER), ("user", message))
    text = _templated(tokenizer, [{"role": role, "content": content} for role, content in talk])
    _, answered, further = text.partition(_ANSWER)
    if not answered:
        raise TextError("The model's chat template leaves out earlier answers, so a chat cannot go on. Begin anew.")
    return _ids(tokenizer, further)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> Tokens:
    """Tokenize a prompt: a question through the chat template, or plain text as `tokenize` does.

    Tokens of a chat have neither spans nor labels: most of their characters are not the user's. Raises TextError as
    `chat_text` and `tokenize`.
    """
    if not chat:
        return tokenize(tokenizer, prompt)
    ids = _ids(tokenizer, chat_text(tokenizer, prompt))
    typed = [name for name in tokenizer.all_special_tokens if name in prompt]
    notes = (f"The model reads {', '.join(typed)} in your message as its own special tokens.",) if typed else ()
    return Tokens(ids, np.zeros((len(ids), 2), dtype=np.int32), (), notes)


def prompt_labels(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str = "", *, chat: bool = False
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Labels of the tokens of a prompt, and the positions of those that say the answer, wherever it stands.

    Raises TextError, as `prompt_tokens`.
    """
    tokens = prompt_tokens(tokenizer, prompt, chat=chat)
    labels, text = tokens.labels, prompt
    starts, ends = tokens.spans.T.tolist() if len(tokens) else ([], [])
    if chat:  # whose text is the template's
        labels = decoded(tokenizer, tokens.ids)
        ends = list(accumulate(map(len, labels)))
        starts, text = [end - len(label) for end, label in zip(ends, labels, strict=True)], "".join(labels)
    answers = [match.span() for match in re.finditer(re.escape(answer), text, re.IGNORECASE)] if answer else []
    spans = zip(starts, ends, strict=True)
    said = (i for i, (start, end) in enumerate(spans) if any(start < last and end > first for first, last in answers))
    return labels, tuple(said)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> tuple[str, ...]:
    """Labels of the tokens [T] of a chat: their text, and that of a character that several share numbered, "🙂 1/4"."""
    labels, begun = list[str](), list[int]()
    for id in ids.tolist():
        begun.append(id)
        text = str(tokenizer.decode(begun))
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(begun) == _MOST_BYTES:
            n = len(begun)
            labels += [text] if n == 1 else [f"{text} {i}/{n}" for i in range(1, n + 1)]
            begun = []
    return (*labels, *(str(tokenizer.decode([id])) for id in begun))


_MOST_BYTES = 4  # of a character in UTF-8
_ANSWER = "An answer \N{SECTION SIGN} 7041."  # stands for one that was written, in a template that is read off


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if not can_chat(tokenizer):
        raise TextError("This model has no chat template. Give it plain text.")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program, and raises what it likes
        raise TextError(f"The model's chat template does not take this question: {str(error)[:200]}") from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Tokens of a text in which the template has written the special ones itself."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
