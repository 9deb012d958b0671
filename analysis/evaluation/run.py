"""How well a model predicts and retrieves, with the full cache and with a compressed one.

Everything here takes specs by name, a mapping from what to call it to a `CompressionSpec` (None is the full cache), so
that a plan that was measured is one more entry. The cache is compressed as it is in use: the prompt in one pass, and
then after every token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from analysis.demo.presets import PASSKEY_QUESTION, passkey
from analysis.errors import SettingsError, TextError
from analysis.models.load import LoadedModel
from analysis.preview import prepared
from analysis.recorder import check_length
from analysis.texts.tokens import Tokens, beginning, check_text, tokenize
from l2kv import CompressedCache, CompressionSpec
from l2kv.cache import cache_nbytes
from l2kv.decoding import decode_one_token, new_cache, prefill
from l2kv.policies import POLICIES

Specs = Mapping[str, CompressionSpec | None]
"""What is compared, by name; None is the full cache."""

OnDone = Callable[[int, int], None]
"""Called as (trials done, trials), after each; in the middle of long ones too, with the same numbers as before, so that
they can be cancelled. What it raises cancels the evaluation and passes through."""


def ignore(done: int, total: int) -> None:
    """For those who do not ask for progress."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """How well the tokens after a prompt were predicted, and from how much."""

    nll: float  # nats a token
    nbytes: int  # of the keys and values held after the last token, counted from the cache's tensors, without slack


def continuation_nll(
    loaded: LoadedModel, text: str, spec: CompressionSpec | None, *, prompt_tokens: int, new_tokens: int
) -> float:
    """The nats a token of one of `continuations`. Raises as that."""
    ((one,),) = continuations(loaded, [text], [spec], prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    return one.nll


@torch.inference_mode()
def continuations(
    loaded: LoadedModel,
    texts: Sequence[str],
    specs: Sequence[CompressionSpec | None],
    *,
    prompt_tokens: int,
    new_tokens: int,
    on_done: OnDone = ignore,
) -> tuple[tuple[Continuation, ...], ...]:
    """Mean negative log likelihood of the `new_tokens` tokens that follow the prompt in each text, by each spec.

    The prompt but for its last token is run and compressed; from there on the text is fed one token at a time, and the
    cache evicts after each, so that already the first token is predicted from a compressed cache. Texts are the rows of
    a batch: all are of one length, and no row sees another.

    Args:
        specs: what to keep; None is the full cache.
        prompt_tokens: tokens of the prompt, special ones included, 2 or more.
        on_done: a trial is a text by a spec. Called at every token, too.

    Returns:
        For each spec a row of the texts.

    Raises:
        TextError: empty, shorter than `prompt_tokens + new_tokens`, or more than the model can take.
        ModelError, OutOfMemoryError: as `stream`.
        SettingsError: a spec does not fit the model, or a number is out of range.
    """
    if prompt_tokens < 2 or new_tokens < 1:
        raise SettingsError(
            f"prompt_tokens must be 2 or more and new_tokens 1 or more, got {prompt_tokens}, {new_tokens}"
        )
    length = prompt_tokens + new_tokens
    ids = [_first_tokens(loaded, text, prompt_tokens, new_tokens) for text in texts]
    rows = max(1, _TOKENS_AT_ONCE // length)
    batches = [torch.cat(ids[start : start + rows]) for start in range(0, len(ids), rows)]
    done, total, results = 0, len(texts) * len(specs), []
    with prepared(loaded):
        for spec in specs:
            results.append([])
            for batch in batches:
                results[-1] += _continue(loaded, batch, spec, prompt_tokens, partial(on_done, done, total))
                for _ in batch:
                    done += 1
                    on_done(done, total)
    return tuple(map(tuple, results))


_TOKENS_AT_ONCE = 8192  # in the rows of a batch; of a model of 7 billion weights their full cache takes 4 GiB


def _first_tokens(loaded: LoadedModel, text: str, prompt_tokens: int, new_tokens: int) -> Tensor:
    """[1, prompt_tokens + new_tokens]"""
    tokens = tokenize(loaded.tokenizer, text).ids
    if len(tokens) < prompt_tokens + new_tokens:
        raise TextError(
            f"The text has {len(tokens)} tokens; {prompt_tokens} of prompt and {new_tokens} more are needed."
        )
    tokens = tokens[: prompt_tokens + new_tokens]
    _check(loaded, tokens, new_tokens=0)
    return _on_device(loaded, tokens)


def _continue(
    loaded: LoadedModel, ids: Tensor, spec: CompressionSpec | None, prompt_tokens: int, on_token: Callable[[], None]
) -> list[Continuation]:
    """Of the rows of ids [B, T]; `on_token` is called before each token that is fed."""
    rows, length = ids.shape
    cache = new_cache(loaded.config, spec)
    prefill(loaded.model, ids[:, : prompt_tokens - 1], cache)
    nats = ids.new_zeros(rows, dtype=torch.float64)
    for position in range(prompt_tokens, length):
        on_token()
        last = ids[:, position - 1 : position]
        logits = loaded.model(last, past_key_values=cache, use_cache=True).logits[:, -1]
        nats += torch.nn.functional.cross_entropy(logits.float(), ids[:, position], reduction="none")
    nbytes = cache_nbytes(cache, slack=False) // rows
    return [Continuation(nll, nbytes) for nll in (nats / (length - prompt_tokens)).tolist()]


@dataclass(frozen=True, slots=True)
class NllChange:
    """What a compression costs on some texts."""

    spec: str  # its name
    mean: float  # NLL with it less NLL with the full cache, nats a token, mean over the texts
    by_text: tuple[float, ...]


def nll_changes(
    loaded: LoadedModel,
    texts: Sequence[str],
    specs: Specs,
    *,
    prompt_tokens: int,
    new_tokens: int,
    on_done: OnDone = ignore,
) -> tuple[NllChange, ...]:
    """The change of `continuation_nll` by each spec against the full cache, over the same texts. Raises as that."""
    full, *rows = continuations(
        loaded, texts, (None, *specs.values()), prompt_tokens=prompt_tokens, new_tokens=new_tokens, on_done=on_done
    )
    changes = []
    for name, row in zip(specs, rows, strict=True):
        by_text = tuple(one.nll - whole.nll for one, whole in zip(row, full, strict=True))
        changes.append(NllChange(name, float(np.mean(by_text)), by_text))
    return tuple(changes)


def prompt_of(loaded: LoadedModel, text: str, n_tokens: int) -> str:
    """The characters of the first `n_tokens` tokens of a text. Raises TextError if it has fewer."""
    check_text(text)
    prompt, enough = beginning(loaded.tokenizer, text, n_tokens)
    if not enough:
        n = len(tokenize(loaded.tokenizer, text))
        raise TextError(f"The text has {n} tokens; a prompt of {n_tokens} is needed.")
    return prompt


@dataclass(frozen=True, slots=True, eq=False)
class PasskeyPrompt:
    """The paper's passkey task, cut where the cache is compressed: the question is asked of what is left."""

    key: int
    context: np.ndarray  # [C] int64: the task, the filler and the key in it
    question: np.ndarray  # [Q] int64


def passkey_text(tokenizer: PreTrainedTokenizerBase, key: int, *, n_tokens: int, depth: float) -> str:
    """A passkey prompt of at most `n_tokens` tokens, question included, as many as whole repeats of the filler give.

    Args:
        depth: where among the filler the key is told: 0 before all of it, 1 after all of it.

    Raises:
        TextError: `n_tokens` are too few for the prompt without any filler.
        SettingsError: the depth is not from 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise SettingsError(f"depth must be from 0 to 1, got {depth}")

    def prompt(repeats: int) -> str:
        before = round(depth * repeats)
        return passkey(key, before=before, after=repeats - before)

    def length(repeats: int) -> int:
        return len(tokenize(tokenizer, prompt(repeats)))

    bare = length(0)
    if n_tokens < bare:
        raise TextError(f"A passkey prompt takes {bare} tokens without any filler, more than the {n_tokens} asked for.")
    repeats = (n_tokens - bare) // (length(1) - bare)
    while length(repeats) > n_tokens:  # a tokenizer may join the parts to other tokens than it makes of each
        repeats -= 1
    return prompt(repeats)


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, key: int, *, n_tokens: int, depth: float) -> PasskeyPrompt:
    """The tokens of a `passkey_text`, cut before its question. Raises as that."""
    text = passkey_text(tokenizer, key, n_tokens=n_tokens, depth=depth)
    ids = tokenize(tokenizer, text).ids
    context = tokenize(tokenizer, text.removesuffix(f" {PASSKEY_QUESTION}")).ids
    shared = min(len(context), len(ids) - 1)
    same = ids[:shared] == context[:shared]
    cut = shared if same.all() else int(same.argmin())
    return PasskeyPrompt(key, ids[:cut], ids[cut:])


def _most_tokens(prompt: PasskeyPrompt) -> int:
    """Tokens of an answer, more than digits: a space may be one."""
    return 2 * len(str(prompt.key)) + 1


def _caches_after(loaded: LoadedModel, context: Tensor, specs: Iterable[CompressionSpec | None]) -> Iterator[Cache]:
    """A cache that holds the context [1, C], for each spec. The model runs once for all that can share its pass."""
    full = new_cache(loaded.config, None)
    prefill(loaded.model, context, full)
    for spec in specs:
        if spec is None:
            yield copy.deepcopy(full)
        elif POLICIES[spec.policy].needs_attention:
            cache = new_cache(loaded.config, spec)
            prefill(loaded.model, context, cache)
            yield cache
        else:
            yield CompressedCache.from_full(full, loaded.config, spec)


def _says_key(loaded: LoadedModel, prompt: PasskeyPrompt, cache: Cache) -> bool:
    """Whether a cache that holds the context answers the question with the key."""
    digits = str(prompt.key)
    token = decode_one_token(loaded.model, _on_device(loaded, prompt.question), cache)
    said = [int(token)]
    for _ in range(_most_tokens(prompt) - 1):
        answer = loaded.tokenizer.decode(said).strip()
        if len(answer) >= len(digits) or not digits.startswith(answer):
            break
        token = decode_one_token(loaded.model, token, cache)
        said.append(int(token))
    return loaded.tokenizer.decode(said).strip().startswith(digits)


def _check(loaded: LoadedModel, ids: np.ndarray, *, new_tokens: int) -> None:
    """Raise TextError if the model has no such tokens or, where they are learned, too few positions."""
    check_length(loaded, Tokens(ids, np.zeros((len(ids), 2), np.int32), ()), new_tokens=new_tokens)


def _on_device(loaded: LoadedModel, ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids)[None].to(loaded.device)


@dataclass(frozen=True, slots=True)
class PasskeyScore:
    """How often the key was found at one length and depth."""

    spec: str  # its name
    n_tokens: int  # at most, as asked for
    depth: float
    found: int
    trials: int


@torch.inference_mode()
def passkey_grid(
    loaded: LoadedModel,
    specs: Specs,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    keys: Sequence[int],
    on_done: OnDone = ignore,
) -> tuple[PasskeyScore, ...]:
    """How often the model, asked after compression, says the key exactly, greedily: by spec, length and depth.

    All but the question is run once, and compressed by each spec; the question is run over what is left, and so is
    every digit, and the caches go on evicting.

    Raises:
        TextError, SettingsError: as `passkey_text`, or more than the model can take.
        ModelError, OutOfMemoryError: as `stream`.
    """
    places = [(length, depth) for length in lengths for depth in depths]
    prompts = {
        place: [passkey_prompt(loaded.tokenizer, key, n_tokens=place[0], depth=place[1]) for key in keys]
        for place in places
    }
    for prompt in chain.from_iterable(prompts.values()):
        ids = np.concatenate([prompt.context, prompt.question])
        _check(loaded, ids, new_tokens=_most_tokens(prompt))
    done, total = 0, len(specs) * len(places) * len(keys)
    found = {(name, place): 0 for name in specs for place in places}
    with prepared(loaded):
        for place in places:
            for prompt in prompts[place]:
                caches = _caches_after(loaded, _on_device(loaded, prompt.context), specs.values())
                for name, cache in zip(specs, caches, strict=True):
                    found[name, place] += _says_key(loaded, prompt, cache)
                    done += 1
                    on_done(done, total)
    return tuple(PasskeyScore(name, *place, count, len(keys)) for (name, place), count in found.items())


def passkeys(count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Keys of five digits to ask for. Raises SettingsError unless there is one at least."""
    if count < 1:
        raise SettingsError(f"at least one key is needed, got {count}")
    return tuple(int(key) for key in np.random.default_rng(seed).integers(10_000, 100_000, count))
