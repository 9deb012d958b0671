"""Does ALR tell which layers to leave whole? Each layer compressed alone, and what that costs, beside its ALR.

ALR is read off attention; the cost is measured by predicting text. Where the two order layers alike, ALR may choose:
the paper chooses by ALR itself, `analysis.plans.skip` by ALR / chance, and both are held against the cost. A check is a
record on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import ModelError, RecordError, SettingsError, TextError
from analysis.files import content_of, record
from analysis.plans.allocation import plan
from analysis.plans.skip import RULES, SkipSuggestion, layer_loss, spec_of, widest_gap
from analysis.statistics import MIN_TEXTS, Interval, means, resamples, spearman, told_of_documents
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.evaluation.run import OnDone
    from analysis.models.load import LoadedModel
    from analysis.plans.curves import LossCurves

VERSION = 1
COSTS_AT = 0.2  # the ratio at which each head is compressed alone: small, so that a cost stands out
POLICIES = ("low_norm", "high_norm")  # those that ALR speaks of, and that differ from chance


@dataclass(frozen=True, slots=True, eq=False)
class CausalCheck:
    """What compressing one layer alone costs, and its ALR, for K layers and N texts."""

    model: str
    spec: CompressionSpec  # of the layer that is compressed
    layers: tuple[int, ...]  # K, those that can be compressed
    nll_change: np.ndarray  # [K, N] nats a token, against the full cache
    loss: np.ndarray  # [K, N] ALR / chance of the layer on the prompt, by the policy of the spec; NaN is undefined
    agreement: Interval  # Spearman over layers of the means over texts, of cost and `loss`
    paper: np.ndarray | None = None  # [K, N] the paper's ALR, as `loss`; None of files older than this field
    documents: tuple[str, ...] = ()  # N, names of what the texts are excerpts of; none of older files: not known

    @property
    def paper_agreement(self) -> Interval | None:
        """As `agreement`, of cost and the paper's ALR; None where that was not kept."""
        return None if self.paper is None else agreement(self.nll_change, self.paper, documents=self.documents)

    def __str__(self) -> str:
        n = self.loss.shape[1]
        by_paper = "" if self.paper is None else f"; of the paper's ALR and that cost: {self.paper_agreement}"
        return (
            f"Spearman of ALR / chance and of the cost of compressing one layer alone, over {len(self.layers)} layers "
            f"and {n} text{'s' * (n != 1)}: {self.agreement}{by_paper}. {told_of_documents(self.documents)}"
        ).strip()

    def to_json(self) -> str:
        """The file's text."""
        return record("causal", VERSION, asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CausalCheck:
        """Read a check, which may come from anyone. Raises RecordError, with the reason."""
        content = content_of(text, "causal", VERSION, called="check of layers")
        try:
            model, layers = content["model"], tuple(content["layers"])
            if not isinstance(model, str) or not all(type(layer) is int and layer >= 0 for layer in layers):
                raise TypeError(f"model must be text and layers numbers, got {model!r:.60} and {layers!r:.60}")
            spec, paper = spec_of(content["spec"]), content.get("paper")
            nll_change, loss = (np.array(content[name], dtype=np.float64) for name in ("nll_change", "loss"))
            paper = None if paper is None else np.array(paper, dtype=np.float64)
            shapes = {nll_change.shape, loss.shape, loss.shape if paper is None else paper.shape}
            if len(shapes) > 1 or loss.ndim != 2 or len(loss) != len(layers) or not loss.size:
                raise ValueError(f"nll_change, loss and paper must be of a row for each of {len(layers)} layers")
            documents = tuple(content.get("documents", ()))
            if len(documents) not in (0, loss.shape[1]) or not all(isinstance(name, str) for name in documents):
                raise ValueError(f"documents must be {loss.shape[1]} names")
            agreed = agreement(nll_change, loss, documents=documents)
            return cls(model, spec, layers, nll_change, loss, agreed, paper, documents)
        except KeyError as error:
            raise RecordError(f"This is not a causal check that can be read: it has no {error}.") from error
        except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            raise RecordError(f"This is not a causal check that can be read: {str(error)[:200]}") from error


def causal_check(
    loaded: LoadedModel,
    texts: Sequence[str],
    spec: CompressionSpec,
    *,
    prompt_tokens: int,
    new_tokens: int,
    documents: Sequence[str] = (),
    on_done: OnDone | None = None,
) -> CausalCheck:
    """Compress each layer alone by `spec`, all others whole, and measure the change of `continuation_nll`.

    Takes N captures of the prompts, and N * (K + 1) continuations of `new_tokens` tokens.

    Args:
        spec: how; its `skip_layers` are left out of the comparison. Its policy is one of `POLICIES`.
        documents: names of what the texts are excerpts of, if that is known: intervals resample them.
        on_done: for progress and cancelling, as `analysis.evaluation.run.OnDone`: after each capture and
            continuation, and with the same numbers in the middle of one.

    Raises:
        TextError: there are no texts, or one is empty or too short.
        ModelError: no layer can be compressed, or as `capture`.
        SettingsError: the policy is none of `POLICIES`, or as `continuation_nll`.
    """
    from analysis.evaluation.run import (  # waits for torch, which reading a check need not
        ignore,
        nll_changes,
        prompt_of,
    )
    from analysis.recorder import capture

    on_done = on_done or ignore
    if spec.policy not in POLICIES:
        raise SettingsError(f"the policy must be one of {', '.join(POLICIES)}, got {spec.policy!r}")
    if not texts:
        raise TextError("There are no texts to measure on.")
    shape, n_layers = CacheShape.of(loaded.config, loaded.model.dtype.itemsize), loaded.config.num_hidden_layers
    layers = tuple(layer for layer in shape.layers if layer not in spec.skip_layers)
    if not layers:
        raise ModelError(f"{loaded.name} has no layer that the spec compresses.")
    losses, total = [], len(texts) * (2 + len(layers))
    for i, text in enumerate(texts):
        prompt = prompt_of(loaded, text, prompt_tokens)
        run = capture(loaded, prompt, last_queries=0, progress=lambda *_, done=i: on_done(done, total))
        losses.append(layer_loss(run, spec.policy))
        on_done(i + 1, total)
    alone = {str(layer): replace(spec, skip_layers=tuple(k for k in range(n_layers) if k != layer)) for layer in layers}
    changes = nll_changes(
        loaded,
        texts,
        alone,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        on_done=lambda done, _: on_done(len(texts) + done, total),
    )
    nll_change = np.array([change.by_text for change in changes])
    loss, paper = (
        np.stack(by_text, axis=1)[list(layers)]
        for by_text in zip(*((one.by_layer, one.paper) for one in losses), strict=True)
    )
    documents = tuple(documents)
    agreed = agreement(nll_change, loss, documents=documents)
    return CausalCheck(loaded.name, spec, layers, nll_change, loss, agreed, paper, documents)


COSTLY = 0.01  # nats a token: a layer that costs this or more, alone, raises the perplexity by one percent


def suggest_by_cost(
    check: CausalCheck, *, rule: str = "threshold", threshold: float = COSTLY, count: int = 2
) -> SkipSuggestion:
    """Which layers to keep whole, by what was measured: the costliest to compress alone, mean over the texts.

    Every layer takes the same bytes, so the order of the nats saved is that of the nats saved for a byte.

    Args:
        rule: one of `skip.RULES`, of the cost in the place of ALR / chance.
        threshold: of the rule "threshold", nats a token. Layers whose interval holds 0 are not suggested.
        count: of the rule "count".

    Raises:
        SettingsError: the rule is unknown, or `count` out of range.
    """
    if rule not in RULES:
        raise SettingsError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    cost, n = means(check.nll_change.T, documents=check.documents), check.nll_change.shape[1]
    costliest_first = np.argsort(-cost.mean, kind="stable")
    if rule == "threshold":
        chosen = [i for i in costliest_first if cost.mean[i] >= threshold and not cost.low[i] <= 0]
        words = f"Skip every layer that costs {threshold:g} nats a token or more when it is compressed alone."
    elif rule == "count":
        if not 0 <= count <= len(check.layers):
            raise SettingsError(f"count must be from 0 to {len(check.layers)} layers, got {count}")
        chosen = costliest_first[:count].tolist()
        words = f"Skip the {count} layers that cost most when each is compressed alone."
    else:
        widest, words = widest_gap(
            cost.mean[costliest_first], "in what each costs when it is compressed alone", "nats a token"
        )
        chosen = costliest_first[:widest].tolist()
    if chosen:
        told = ", ".join(f"layer {check.layers[i]} {cost.mean[i]:+.3f}" for i in chosen[:6])
        words += f" In nats a token, {told}{', …' * (len(chosen) > 6)}."
    words += f" Measured by prediction, {_told(check.spec)}, on {n} text{'s' * (n != 1)}."
    if n < MIN_TEXTS:
        words += " So few only give a hint."
    return SkipSuggestion(tuple(sorted(check.layers[i] for i in chosen)), words)


def _told(spec: CompressionSpec) -> str:
    kept = f"{spec.keep_ratio:.0%}" if spec.budget is None else f"{spec.budget} tokens"
    return f"{kept} kept by {spec.policy.replace('_', ' ')} with the last {spec.protect_last} protected"


def head_costs(
    loaded: LoadedModel,
    texts: Sequence[str],
    spec: CompressionSpec,
    *,
    prompt_tokens: int,
    new_tokens: int,
    on_done: OnDone | None = None,
) -> np.ndarray:
    """What it costs to compress each kv head alone by `spec`, all others whole: [N, L, Hkv] nats a token.

    NaN in layers that are never compressed. Takes N continuations of `new_tokens` tokens for each kv head.

    Raises:
        As `causal_check`.
    """
    from analysis.evaluation.run import ignore, nll_changes

    if not texts:
        raise TextError("There are no texts to measure on.")
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    heads = [(layer, head) for layer in shape.layers for head in range(shape.n_kv_heads)]
    others_whole = replace(spec, keep_ratio=1.0, budget=None, layer_ratios=None, skip_layers=())
    alone = {str(head): replace(others_whole, head_ratios={head: spec.target_of(*head).ratio}) for head in heads}
    changes = nll_changes(
        loaded, texts, alone, prompt_tokens=prompt_tokens, new_tokens=new_tokens, on_done=on_done or ignore
    )
    costs = np.full((len(texts), loaded.config.num_hidden_layers, shape.n_kv_heads), np.nan)
    for (layer, head), change in zip(heads, changes, strict=True):
        costs[:, layer, head] = change.by_text
    return costs


def weighed_by_cost(
    curves: LossCurves,
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    prompt_tokens: int,
    new_tokens: int,
    on_done: OnDone | None = None,
) -> LossCurves:
    """The curves, `weighed` by `head_costs` at `COSTS_AT`, or at the least ratio there is. Raises as `causal_check`."""
    keep = max(COSTS_AT, curves.least_bin / curves.bins)
    spec = plan(curves, keep, method="uniform").to_spec()
    costs = head_costs(loaded, texts, spec, prompt_tokens=prompt_tokens, new_tokens=new_tokens, on_done=on_done)
    return curves.weighed(costs.mean(axis=0), keep)


def agreement(nll_change: np.ndarray, loss: np.ndarray, *, documents: Sequence[str] = (), seed: int = 0) -> Interval:
    """Spearman over layers of the two means over texts, [K, N] each; the interval resamples the texts of both at once.

    Layers that a text leaves undefined are left out; undefined with fewer than 3 layers, or where all are equal. There
    is no interval with fewer than `MIN_TEXTS` texts.
    """
    defined = (np.isfinite(nll_change) & np.isfinite(loss)).all(axis=1)
    nll_change, loss = nll_change[defined], loss[defined]
    n = loss.shape[1]
    value = float(spearman(nll_change.mean(axis=1), loss.mean(axis=1)))
    if n < MIN_TEXTS or np.isnan(value):
        return Interval(value, np.nan, np.nan)
    counts = resamples(n, documents=documents, seed=seed)
    counts /= counts.sum(axis=1, keepdims=True)
    drawn = spearman(counts @ nll_change.T, counts @ loss.T)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))
