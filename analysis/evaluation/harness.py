"""The model `l2kv` of lm-evaluation-harness: its model `hf` over compressed caches. Needs the extra `eval`.

A prompt is run but for its last token and compressed, so that likelihoods respond to compression too, and even the
first token that is scored or generated comes from what is left. Knows no task, nor how one is scored.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import chunks
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from analysis.errors import SettingsError
from analysis.models.load import NAMED_MODELS, LoadedModel, model_folder
from analysis.plans.skip import Plan, skip_list
from analysis.preview import prepared
from analysis.records import load
from l2kv import CompressionSpec
from l2kv.decoding import new_cache, prefill
from l2kv.padding import row_inputs

Request: TypeAlias = tuple[Any, list[int], list[int]]
"""(key in the harness's own cache, tokens of a context, tokens of its continuation)"""
Answer: TypeAlias = tuple[float, bool]
"""(log likelihood of a continuation, whether it is the greedy one)"""
Tokens: TypeAlias = tuple[int, ...]


class Row(NamedTuple):
    """Tokens to run over a compressed prompt, and the continuations that they score."""

    prompt: int
    """Place of the prompt in its batch."""
    tokens: Tokens
    """The last token of the context, and the continuation without its last."""
    continuations: dict[int, list[int]]
    """By number of the request; they differ in their last token alone."""


_log = logging.getLogger(__name__)


@register_model("l2kv")
class CompressedLM(HFLM):  # type: ignore[misc]  # untyped
    """Model of lm-evaluation-harness that compresses each prompt, and then goes on evicting.

    Results do not depend on the batch size: prompts of different lengths are run apart where padding, which counts as
    tokens seen, would change what is kept.

    Args:
        pretrained: as for `hf`, or the name of a packaged or bundled model.
        plan: file of a saved plan to compress by.
        chunk_size: number of tokens of a continuation that are scored before the cache evicts again.
        options: fields of `CompressionSpec`, where there is no plan, and arguments of `hf`.

    Raises:
        SettingsError, SpecError: an option is out of range, does not fit the model, or contradicts the plan.
        ModelError: the model cannot be compressed, or a named one cannot be had.
        RecordError: the plan cannot be read.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        plan: str | Path | None = None,
        chunk_size: int = 64,
        **options: Any,
    ) -> None:
        own = {field.name for field in fields(CompressionSpec)} & options.keys()
        self._spec = _spec(plan, {name: options.pop(name) for name in own})
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise SettingsError(f"chunk_size must be a whole number, 1 or more, got {chunk_size!r}")
        if str(size := options.get("batch_size")).startswith("auto"):
            raise SettingsError(f"batch_size must be a number, got {size!r}: none is looked for with compressed caches")
        self._chunk_size = chunk_size
        options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(str(model_folder(pretrained)) if pretrained in NAMED_MODELS else pretrained, **options)
        self._loaded = LoadedModel(self.model, self.tokenizer, str(self.pretrained))
        with self._ready():
            self._new_cache()  # a spec that does not fit the model is refused before any work

    def get_model_info(self) -> dict[str, Any]:
        """What the harness saves of a model, and the spec."""
        return {**super().get_model_info(), "l2kv_spec": asdict(self._spec), "l2kv_chunk_size": self._chunk_size}

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Within the block the model takes compressed caches, at the precision that was asked for."""
        dtype = self.mixed_precision_dtype
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        with torch.inference_mode(), prepared(self._loaded), autocast:
            yield

    @cached_property
    def _special_ids(self) -> tuple[int, ...] | None:
        return self._loaded.special_ids(self._spec)

    def _new_cache(self) -> Cache:
        return new_cache(self._loaded.config, self._spec, special_ids=self._special_ids)

    def _filled(self, prompts: Tensor, mask: Tensor) -> Cache:
        """A cache that has read prompts [B, T], of padding where the mask is 0, and is compressed."""
        cache = self._new_cache()
        if prompts.shape[1]:
            prefill(self.model, prompts, cache, attention_mask=mask)
        return cache

    @property
    def _padding_counts(self) -> bool:
        """Whether rows that are padded keep more: of a share of the tokens they do, of a fixed budget not."""
        spec = self._spec
        ratios = [spec.keep_ratio] if spec.budget is None else []
        ratios += [ratio for _, ratio in (*(spec.layer_ratios or ()), *(spec.head_ratios or ()))]
        return min(ratios, default=1.0) < 1 or spec.prune_after > 0 or spec.evict_every > 1

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Continue prompts [B, T], padded on the left, as `hf` does; on the right, padding makes them of one length."""
        mask = options.pop("attention_mask")
        begins = (mask == 0).sum(dim=1) if self._padding_counts else mask.new_zeros(len(mask))
        new: dict[int, Tensor] = {}
        for begin in begins.unique().tolist():
            rows = (begins == begin).nonzero()[:, 0]
            prompts, real = context[rows, begin:], mask[rows, begin:]
            with self._ready():
                cache = self._filled(prompts[:, :-1], real[:, :-1])
                cache.batch_repeat_interleave(options.get("num_beams") or 1)
                continued = super()._model_generate(
                    prompts, max_length - begin, stop, attention_mask=real, past_key_values=cache, **options
                )
            new |= dict(zip(rows.tolist(), continued[:, prompts.shape[1] :], strict=True))
        in_order = [new[row] for row in range(len(context))]
        return torch.cat([context, pad_sequence(in_order, True, float(self.tokenizer.pad_token_id))], dim=1)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Score each continuation over its compressed context, which is run once for all of its continuations."""
        size, asked = override_bs or int(self.batch_size), _by_prompt(requests, self.max_length)
        answers: dict[int, Answer] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar, self._ready():
            for prompts in _batches(asked, size, alike=self._padding_counts):
                ids, mask = self._stacked(prompts, "left")
                cache = self._filled(ids, mask)
                rows = (Row(i, *of_row) for i, prompt in enumerate(prompts) for of_row in asked[prompt].items())
                for some in chunks(rows, size):
                    places = torch.tensor([row.prompt for row in some], device=self.device)
                    of_rows = copy.deepcopy(cache)  # as each row goes on evicting
                    of_rows.batch_select_indices(places)
                    found = self._scores(some, of_rows, mask[places])
                    for number, answer in found.items():
                        if (key := requests[number][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", key, answer)
                    answers |= found
                    bar.update(len(found))
        return [answers[number] for number in range(len(requests))]

    def _scores(self, rows: Sequence[Row], cache: Cache, mask: Tensor) -> dict[int, Answer]:
        """Score the continuations of rows, by number of the request, over a cache of their prompts [R, ...].

        What follows the end of a row that is shorter than others is run and ignored.
        """
        ids, fed = self._stacked([row.tokens for row in rows], "right")
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        sums = {number: 0.0 for row in rows for number in row.continuations}
        greedy = dict.fromkeys(sums, True)
        for start in range(0, ids.shape[1], self._chunk_size):
            new = ids[:, start : start + self._chunk_size]
            seen = mask[:, : mask.shape[1] - ids.shape[1] + start + new.shape[1]]
            padded = row_inputs(self.model, seen, new.shape[1])
            logits = self.model(new, past_key_values=cache, use_cache=True, **padded).logits
            logprobs = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            for of_row, row in zip(logprobs, rows, strict=True):
                for number, continuation in row.continuations.items():
                    target = torch.tensor(continuation[start:][: new.shape[1]], dtype=torch.long, device=self.device)
                    of_target = of_row[: len(target)]
                    sums[number] += float(of_target.gather(1, target[:, None]).sum())
                    greedy[number] &= bool((of_target.argmax(dim=1) == target).all())
        return {number: (sums[number], greedy[number]) for number in sums}

    def _stacked(self, rows: Sequence[Tokens], side: str) -> tuple[Tensor, Tensor]:
        """Rows of tokens [R, T], padded on a side, and their mask, 0 for padding."""
        ids = [torch.tensor(row, dtype=torch.long, device=self.device) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        padded = [pad_sequence(of_rows, batch_first=True, padding_side=side) for of_rows in (ids, masks)]
        return padded[0], padded[1]


def _by_prompt(requests: Sequence[Request], max_length: int) -> dict[Tokens, dict[Tokens, dict[int, list[int]]]]:
    """Group requests by what precedes the last token of their contexts, then by what is run after it.

    Contexts that are too long lose their beginning, as with `hf`.
    """
    grouped: dict[Tokens, dict[Tokens, dict[int, list[int]]]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        room = max_length + 1 - len(continuation)
        if len(context) > room:
            _log.warning("A context of %d tokens was cut to its last %d.", len(context), room)
        *prompt, last = context[-room:]
        of_prompt = grouped.setdefault(tuple(prompt), {})
        of_prompt.setdefault((last, *continuation[:-1]), {})[number] = continuation
    return grouped


def _batches(prompts: Iterable[Tokens], size: int, *, alike: bool) -> Iterator[list[Tokens]]:
    """Batches of at most `size` prompts, the longest first; `alike`: those of a batch have one length."""
    for _, group in groupby(sorted(prompts, key=len, reverse=True), key=len if alike else lambda prompt: 0):
        yield from chunks(group, size)


def _spec(plan: str | Path | None, given: dict[str, Any]) -> CompressionSpec:
    """The spec of a plan, or of the fields given. Raises SettingsError, SpecError, RecordError."""
    if plan is not None:
        if given:
            raise SettingsError(f"The plan says how to compress: leave out {', '.join(sorted(given))}.")
        return load(Plan, plan).spec
    if isinstance(layers := given.get("skip_layers"), int | str):  # what the harness makes of 0, and of 0 1
        given["skip_layers"] = skip_list(str(layers))
    try:
        return CompressionSpec(**given)
    except TypeError as error:  # all values are a user's
        raise SettingsError(str(error)) from error
