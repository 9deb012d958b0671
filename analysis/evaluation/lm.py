"""The task `lm`: how well the tokens of a text are predicted, one by one. Knows tokenizers; runs no model.

Either a prompt is compressed once, and the tokens after it are predicted while the cache keeps evicting; or the cache
evicts from the first token on and every token of a chunk is predicted, as in the quick evaluation of the paper's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from analysis.defaults import EXCERPTS, NEW_TOKENS, PROMPT_TOKENS
from analysis.demo.presets import bundled_prose
from analysis.errors import SettingsError, TextError
from analysis.evaluation.task import Sample, Task
from analysis.texts.excerpts import SPARE, Excerpt, excerpts
from analysis.texts.tokens import beginning, check_text, tokenize
from analysis.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from analysis.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of the prompt and of the continuation, in tokens."""

    prompt_tokens: Annotated[int, "Tokens in each prompt, special tokens included."] = PROMPT_TOKENS
    new_tokens: Annotated[int, "Tokens to predict after the prompt."] = NEW_TOKENS

    @property
    def n_tokens(self) -> int:
        """Number of tokens an excerpt should have: a prompt cut from it may come out a little shorter."""
        return self.prompt_tokens + self.new_tokens + SPARE

    @property
    def settings(self) -> LmSettings:
        """Settings of the task `lm` with these lengths."""
        return LmSettings(self.prompt_tokens, self.new_tokens)

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2 or self.new_tokens < 1:
            raise SettingsError(
                f"prompt_tokens must be 2 or more and new_tokens 1 or more, got {self.prompt_tokens}, {self.new_tokens}"
            )


@dataclass(frozen=True, slots=True)
class LmSettings(Lengths):
    """Lengths of the prompt and of the continuation, or of a chunk, in tokens."""

    chunk_size: Annotated[
        int, "Tokens in each chunk, all predicted while the cache evicts from the first on; replaces the prompt."
    ] = 0
    """0 compresses a prompt once."""

    def __post_init__(self) -> None:
        Lengths.__post_init__(self)
        if self.chunk_size < 0 or self.chunk_size == 1:
            raise SettingsError(f"chunk_size must be 2 or more, or 0 for none, got {self.chunk_size}")

    @property
    def n_tokens(self) -> int:
        """Number of tokens an excerpt should have, as in `Lengths`."""
        return (self.chunk_size or self.prompt_tokens + self.new_tokens) + SPARE

    def within(self, n_tokens: int) -> LmSettings:
        """Shorten the prompt or the chunk to excerpts of `n_tokens`."""
        less = max(0, self.n_tokens - n_tokens)
        if self.chunk_size:
            return replace(self, chunk_size=self.chunk_size - less)
        return replace(self, prompt_tokens=self.prompt_tokens - less)


def lm_sample(tokenizer: PreTrainedTokenizerBase, excerpt: Excerpt, settings: LmSettings) -> Sample:
    """Make the sample of one text.

    Its context is the prompt without its last token, so that even the first token after the prompt is predicted from
    a compressed cache. A chunk has no context.

    Raises:
        TextError: the text is empty, or too short.
    """
    prompt, end = settings.prompt_tokens, settings.prompt_tokens + settings.new_tokens
    if settings.chunk_size:
        prompt, end = 1, settings.chunk_size
    ids = tokenize(tokenizer, excerpt.text).ids
    if len(ids) < end:
        raise TextError(
            f"{excerpt.name}: the text has {counted(len(ids), 'token')}; {prompt} are needed for the prompt, "
            f"{end - prompt} after it. Give a longer text."
        )
    context, question, target = ids[: prompt - 1], ids[prompt - 1 : prompt], ids[prompt:end]
    return Sample(excerpt.name, context, question, target, document=excerpt.document)


def _build(loaded: LoadedModel, settings: LmSettings, texts: Sequence[Excerpt]) -> tuple[Sample, ...]:
    return tuple(lm_sample(loaded.tokenizer, excerpt, settings) for excerpt in texts)


def _bundled(loaded: LoadedModel, settings: LmSettings) -> tuple[LmSettings, tuple[Excerpt, ...]]:
    """Cut settings to the shortest bundled text, and take excerpts of that length from all of them."""
    texts = bundled_prose()
    settings = settings.within(min(len(tokenize(loaded.tokenizer, text)) for text in texts.values()))
    return settings, excerpts(loaded.tokenizer, texts, n_tokens=settings.n_tokens, at_most=EXCERPTS)


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str, n_tokens: int) -> str:
    """Take the characters of the first `n_tokens` tokens of a text. Raises TextError if it has fewer."""
    check_text(text)
    prompt, enough = beginning(tokenizer, text, n_tokens)
    if not enough:
        n = len(tokenize(tokenizer, text))
        raise TextError(f"The text has {n} tokens; a prompt of {n_tokens} is needed. Give a longer text.")
    return prompt


LM = Task(
    title="Prediction",
    about="Mean negative log likelihood of the tokens that follow a prompt, fed one by one over the evicting cache.",
    unit="nats/token",
    higher_is_better=False,
    build=_build,
    settings=LmSettings,
    texts="must",
    excerpt_tokens=lambda settings: settings.n_tokens,
    bundled=_bundled,
)
