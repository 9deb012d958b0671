"""The task `lm`: how well the tokens that follow a prompt are predicted. Knows tokenizers; runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from analysis.defaults import NEW_TOKENS, PROMPT_TOKENS
from analysis.errors import SettingsError, TextError
from analysis.evaluation.task import Sample, Task
from analysis.texts.excerpts import SPARE, Excerpt
from analysis.texts.tokens import beginning, check_text, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from analysis.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class LmSettings:
    """Lengths of the prompt and of what is predicted after it, in tokens."""

    prompt_tokens: Annotated[int, "Tokens in each prompt, special tokens included."] = PROMPT_TOKENS
    new_tokens: Annotated[int, "Tokens to predict after the prompt."] = NEW_TOKENS

    @property
    def n_tokens(self) -> int:
        """Tokens to ask of an excerpt: a prompt cut from it may be some shorter."""
        return self.prompt_tokens + self.new_tokens + SPARE

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2 or self.new_tokens < 1:
            raise SettingsError(
                f"prompt_tokens must be 2 or more and new_tokens 1 or more, got {self.prompt_tokens}, {self.new_tokens}"
            )


def lm_sample(tokenizer: PreTrainedTokenizerBase, excerpt: Excerpt, settings: LmSettings) -> Sample:
    """The sample of one text: its prompt but for the last token is the context, so that already the first token after
    the prompt is predicted from a compressed cache.

    Raises:
        TextError: the text is empty, or too short.
    """
    prompt, new = settings.prompt_tokens, settings.new_tokens
    ids = tokenize(tokenizer, excerpt.text).ids
    if len(ids) < prompt + new:
        raise TextError(f"The text has {len(ids)} tokens; {prompt} of prompt and {new} more are needed.")
    context, question, target = ids[: prompt - 1], ids[prompt - 1 : prompt], ids[prompt : prompt + new]
    return Sample(excerpt.name, context, question, target, document=excerpt.document)


def _build(loaded: LoadedModel, settings: LmSettings, texts: Sequence[Excerpt]) -> tuple[Sample, ...]:
    return tuple(lm_sample(loaded.tokenizer, excerpt, settings) for excerpt in texts)


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str, n_tokens: int) -> str:
    """The characters of the first `n_tokens` tokens of a text. Raises TextError if it has fewer."""
    check_text(text)
    prompt, enough = beginning(tokenizer, text, n_tokens)
    if not enough:
        n = len(tokenize(tokenizer, text))
        raise TextError(f"The text has {n} tokens; a prompt of {n_tokens} is needed.")
    return prompt


LM = Task(
    title="Prediction",
    about="Mean negative log likelihood of the tokens that follow a prompt, fed one by one over the evicting cache.",
    unit="nats/token",
    higher_is_better=False,
    build=_build,
    settings=LmSettings,
    needs_texts=True,
)
