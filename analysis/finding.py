"""Presets that show something, found by a search whose criteria are stated, not chosen by eye.

Three are looked for, on one model:
- calm:    a passage on which keeping half the cache, as the app proposes, changes next to nothing: the mean NLL of the
           tokens that follow moves by less than `Criteria.calm`;
- breaks:  a passage on which keeping half by the paper's own defaults (nothing protected) costs more than
           `Criteria.breaks`;
- passkey: a passkey prompt whose key is found with the full cache and at some ratio below 1, and lost at a smaller one.

All candidates are measured, the first that meets a criterion is taken, and how many did is written down with it: a text
that one in fifty candidates gives is another thing than one that every second gives. Where none meets it the search
fails, and says how near the best came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from analysis.errors import TextError, UserError
from analysis.evaluation import OnDone, continuation_nll, ignore, passkey_text, passkeys
from analysis.generation import stream
from analysis.models import LoadedModel
from analysis.presets import FoundPresets, Preset
from analysis.tasks import decided
from analysis.tasks import found as answered
from analysis.tokens import Passage, passages
from l2kv import CompressionSpec

CALM_SPEC = CompressionSpec(keep_ratio=0.5, protect_last=32)
"""What the app proposes."""
BREAKS_SPEC = CompressionSpec(keep_ratio=0.5)
"""The paper's defaults."""
_SLACK = 100  # tokens


@dataclass(frozen=True, slots=True)
class Criteria:
    """What a preset has to show, and among how many candidates it is looked for."""

    calm: float = 0.02
    """Nats a token: the NLL must move by less, either way."""
    breaks: float = 0.5
    """Nats a token: the NLL must rise by more."""
    new_tokens: int = 100
    """Tokens after the passage that the NLL is the mean of."""
    lengths: tuple[int, ...] = (256, 400, 520)
    """Tokens that the passages have at least; at most 100 more, for the sentence to end."""
    most: int = 48
    """Passages tried."""
    ratios: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    """Keep ratios of the passkey, falling."""
    passkey_tokens: tuple[int, ...] = (250, 450, 700, 950)
    """Tokens of the passkey prompts, at most."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    keys: int = 2
    """Keys tried at each length and depth."""


class NotFoundError(UserError):
    """No candidate meets a criterion; the message names it, and the best value there was."""


def find_presets(
    loaded: LoadedModel,
    texts: Mapping[str, str],
    *,
    criteria: Criteria | None = None,
    without_passkey: bool = False,
    on_done: OnDone = ignore,
) -> FoundPresets:
    """Search the texts for a calm and a breaking passage, and a grid of passkeys for one that is lost halfway.

    Args:
        loaded: the model.
        texts: by name.
        criteria: other than the usual ones.
        without_passkey: do not look for a passkey: for a model that cannot retrieve any.
        on_done: called as (candidates measured, candidates), for the passages.

    Raises:
        NotFoundError: nothing meets one of the criteria.
        TextError, ModelError, OutOfMemoryError: as `continuation_nll`.
    """
    criteria = criteria or Criteria()
    measured = _measure(loaded, _candidates(loaded, texts, criteria), criteria, on_done)
    found = [_calm(loaded.name, measured, criteria), _breaks(loaded.name, measured, criteria)]
    if not without_passkey:
        found.append(_passkey(loaded, criteria))
    return FoundPresets(loaded.name, tuple(found), without_passkey)


@dataclass(frozen=True, slots=True)
class _Measured:
    source: str  # name of the text it is from
    prompt: str
    prompt_tokens: int
    full: float  # NLL with the full cache, nats a token
    calm: float  # with CALM_SPEC
    breaks: float  # with BREAKS_SPEC


def _candidates(loaded: LoadedModel, texts: Mapping[str, str], criteria: Criteria) -> list[tuple[str, Passage]]:
    """Passages of all texts and lengths in turn, so that the first `most` are of each."""
    positions = getattr(loaded.config, "max_position_embeddings", None) or float("inf")
    rows = [
        _passages(loaded, name, text, length, criteria.new_tokens)
        for length in criteria.lengths
        if length + criteria.new_tokens <= positions
        for name, text in texts.items()
    ]
    fitting = (
        row
        for row in chain.from_iterable(zip_longest(*rows))
        if row is not None and row[1].prompt_tokens + criteria.new_tokens <= positions
    )
    found = list(islice(fitting, criteria.most))
    if not found:
        shortest = min(criteria.lengths)
        raise TextError(
            f"The {len(texts)} texts hold no passage of whole sentences of {shortest} tokens with "
            f"{criteria.new_tokens} more after it that fits the model's {positions} positions. Give longer texts."
        )
    return found


def _passages(loaded: LoadedModel, name: str, text: str, length: int, following: int) -> Iterator[tuple[str, Passage]]:
    for passage in passages(loaded.tokenizer, text, at_least=length, at_most=length + _SLACK, following=following):
        yield name, passage


def _measure(
    loaded: LoadedModel, candidates: Sequence[tuple[str, Passage]], criteria: Criteria, on_done: OnDone
) -> list[_Measured]:
    measured = []
    for source, passage in candidates:
        full, calm, breaks = (
            continuation_nll(
                loaded,
                passage.prompt + passage.following,
                spec,
                prompt_tokens=passage.prompt_tokens,
                new_tokens=criteria.new_tokens,
            )
            for spec in (None, CALM_SPEC, BREAKS_SPEC)
        )
        measured.append(_Measured(source, passage.prompt, passage.prompt_tokens, full, calm, breaks))
        on_done(len(measured), len(candidates))
    return measured


def _calm(model: str, measured: Sequence[_Measured], criteria: Criteria) -> Preset:
    def change(one: _Measured) -> float:
        return one.calm - one.full

    chosen, count = _first(
        measured,
        lambda one: abs(change(one)) < criteria.calm,
        lambda: (
            f"calm: |change of NLL| below {criteria.calm:g} with {_in_words(CALM_SPEC)}; the smallest is "
            f"{min(abs(change(one)) for one in measured):.3f} nats a token"
        ),
    )
    why = (
        f"Half the cache, hardly a change. {_told(model, chosen, chosen.calm, CALM_SPEC, criteria)} {count} of "
        f"{len(measured)} passages tried stay within {criteria.calm:g}; this is the first."
    )
    return Preset("Calm: half the cache will do", chosen.prompt, why, CALM_SPEC)


def _breaks(model: str, measured: Sequence[_Measured], criteria: Criteria) -> Preset:
    def change(one: _Measured) -> float:
        return one.breaks - one.full

    chosen, count = _first(
        measured,
        lambda one: change(one) > criteria.breaks,
        lambda: (
            f"breaks: change of NLL above {criteria.breaks:g} with {_in_words(BREAKS_SPEC)}; the largest is "
            f"{max(map(change, measured)):+.3f} nats a token"
        ),
    )
    why = (
        f"Half the cache, and it breaks. {_told(model, chosen, chosen.breaks, BREAKS_SPEC, criteria)} {count} of "
        f"{len(measured)} passages tried lose more than {criteria.breaks:g}; this is the first."
    )
    return Preset("Breaks: nothing protected", chosen.prompt, why, BREAKS_SPEC)


def _first(
    measured: Sequence[_Measured], meets: Callable[[_Measured], bool], criterion: Callable[[], str]
) -> tuple[_Measured, int]:
    """The first that meets a criterion, and how many do."""
    meeting = [one for one in measured if meets(one)]
    if not meeting:
        raise NotFoundError(
            f"None of {len(measured)} passages meets the criterion {criterion()}. Give other texts, or more of them."
        )
    return meeting[0], len(meeting)


def _told(model: str, one: _Measured, with_spec: float, spec: CompressionSpec, criteria: Criteria) -> str:
    return (
        f"With {_in_words(spec)}, the mean NLL of the {criteria.new_tokens} tokens that follow these "
        f"{one.prompt_tokens} of {one.source} goes from {one.full:.3f} to {with_spec:.3f} nats a token "
        f"({with_spec - one.full:+.3f}), in {model}."
    )


def _in_words(spec: CompressionSpec) -> str:
    protected = f"the last {spec.protect_last} protected" if spec.protect_last else "nothing protected"
    return f"keep ratio {spec.keep_ratio:g} by {spec.policy.replace('_', ' ')}, {protected}"


def _passkey(loaded: LoadedModel, criteria: Criteria) -> Preset:
    """The first prompt that is lost halfway, by low norm if there is one, else by high norm."""
    prompts = _passkey_prompts(loaded, criteria)
    found = [(key, text) for key, text in prompts if _answers(loaded, text, key, None)]
    if not found:
        raise NotFoundError(
            f"None of {len(prompts)} prompts meets the criterion passkey: {loaded.name} finds the key in none of them "
            "with the full cache. For a model that cannot retrieve, say so: --without-passkey"
        )
    for policy in ("low_norm", "high_norm"):
        for key, text in found:
            specs = [CompressionSpec(keep_ratio=r, policy=policy, protect_last=32) for r in criteria.ratios]
            survived = [_answers(loaded, text, key, spec) for spec in specs]
            last = max((i for i, ok in enumerate(survived) if ok and not all(survived[i:])), default=None)
            if last is not None:
                why = _passkey_told(loaded.name, len(found), len(prompts), specs, survived)
                name = f"Passkey {key}, found and lost (the paper's task)"
                return Preset(name, text, why, specs[last], answer=str(key))
    raise NotFoundError(
        f"None of {len(prompts)} prompts meets the criterion passkey: found at some keep ratio below 1 and lost at a "
        f"smaller one of {', '.join(f'{r:g}' for r in criteria.ratios)}, by low norm or high norm. The full cache "
        f"finds the key in {len(found)}; compressed, each is found at every ratio or lost from the largest on."
    )


def _passkey_prompts(loaded: LoadedModel, criteria: Criteria) -> list[tuple[int, str]]:
    positions = getattr(loaded.config, "max_position_embeddings", None) or float("inf")
    lengths = [n for n in criteria.passkey_tokens if n + _ANSWER_TOKENS <= positions]
    if not lengths:
        raise NotFoundError(
            f"No passkey prompt of {min(criteria.passkey_tokens)} tokens fits the {positions} positions of "
            f"{loaded.name}. Leave it out: --without-passkey"
        )
    return [
        (key, passkey_text(loaded.tokenizer, key, n_tokens=length, depth=depth))
        for length in lengths
        for depth in criteria.depths
        for key in passkeys(criteria.keys)
    ]


_ANSWER_TOKENS = 12


def _answers(loaded: LoadedModel, text: str, key: int, spec: CompressionSpec | None) -> bool:
    """Whether generating after the prompt says the key, as the app does it: compressed with the question in it."""
    with closing(stream(loaded, text, [spec], max_new_tokens=_ANSWER_TOKENS)) as steps:
        for (step,) in steps:
            if decided(str(key), step.text):
                break
    return answered(str(key), step.text)


def _passkey_told(
    model: str, found: int, prompts: int, specs: Sequence[CompressionSpec], survived: Sequence[bool]
) -> str:
    def ratios(wanted: bool) -> str:
        return ", ".join(f"{spec.keep_ratio:g}" for spec, ok in zip(specs, survived, strict=True) if ok is wanted)

    return (
        f"Keeping by {specs[0].policy.replace('_', ' ')} with the last {specs[0].protect_last} protected, {model} "
        f"still says the key at the keep ratios {ratios(True)}, and no longer at {ratios(False)}; the full cache finds "
        f"it in {found} of {prompts} prompts tried. The question is in the prompt when it is compressed, as on the "
        "page Generate."
    )
