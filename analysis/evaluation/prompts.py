"""Questions to a model, through its chat template or as plain text, and whether an answer is right.

Knows tokenizers and text; knows no model.
"""

from __future__ import annotations

import re
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
    if not can_chat(tokenizer):
        raise TextError("This model has no chat template. Give it plain text.")
    messages = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program, and raises what it likes
        raise TextError(f"The model's chat template does not take this question: {str(error)[:200]}") from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> Tokens:
    """Tokenize a prompt: a question through the chat template, or plain text as `tokenize` does.

    Tokens of a chat have neither spans nor labels: most of their characters are not the user's. Raises TextError as
    `chat_text` and `tokenize`.
    """
    if not chat:
        return tokenize(tokenizer, prompt)
    text = chat_text(tokenizer, prompt)
    # The template writes the special tokens itself.
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    return Tokens(ids, np.zeros((len(ids), 2), dtype=np.int32), ())
