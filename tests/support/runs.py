"""Captures, studies and head vectors made up from numbers, without a model."""

from dataclasses import replace

import numpy as np

from analysis import studies
from analysis.captures import Capture
from analysis.metrics import METRICS, PROBES
from analysis.paper.vectors import HeadVectors
from analysis.plans.curves import text_curves
from analysis.studies import Study


def run_of(key_norm, probe, received=None, recent=None) -> Capture:
    """A capture of [L, Hkv, T] norms and [L, H, T] attention, and [W, L, H, T] of the last queries."""
    key_norm, probe = np.asarray(key_norm, np.float32), np.asarray(probe, np.float32)
    layers, heads, n = probe.shape
    return Capture(
        model="made up",
        architecture="None",
        device="cpu",
        dtype="float32",
        text="x" * n,
        labels=("x",) * n,
        probe_label="y",
        layer_kinds=("full",) * layers,
        windows=(0,) * layers,
        warnings=(),
        seconds=0.0,
        head_dim=8,
        tokens_per_bin=1,
        token_ids=np.arange(n),
        token_spans=np.stack([np.arange(n), np.arange(1, n + 1)], axis=1).astype(np.int32),
        key_norm=key_norm,
        value_norm=key_norm,
        attention_received=probe if received is None else np.asarray(received, np.float32),
        probe_attention=probe,
        recent_attention=np.zeros((0, *probe.shape), np.float32) if recent is None else np.asarray(recent, np.float32),
        pooled_attention=np.zeros((layers, heads, n, n), np.uint8),
        pooled_scale=np.ones((layers, heads), np.float32),
    )


def random_run(seed=0, n=40, *, layers=3, kv_heads=2, group=3, ties=False, **changes) -> Capture:
    """A capture of random norms and a random probe whose rows sum to 0.9; `changes` replace fields of it."""
    rng = np.random.default_rng(seed)
    norm, probe = rng.gamma(5, size=(layers, kv_heads, n)), rng.gamma(0.3, size=(layers, kv_heads * group, n))
    run = run_of(norm.round() if ties else norm, probe / probe.sum(-1, keepdims=True) * 0.9)
    return replace(run, **changes)


def study_of(gamma, without=None, *, documents=(), **metric) -> Study:
    """A study of [N, L, H] numbers for Γ, and for other metrics; all others are 0."""
    gamma = np.asarray(gamma, dtype=float)
    n, layers, heads = gamma.shape
    values = np.zeros((n, len(PROBES), len(METRICS), layers, heads))
    given = {"gamma": gamma, "gamma_skip_first": gamma if without is None else without} | metric
    for name, numbers in given.items():
        values[:, :, list(METRICS).index(name)] = np.asarray(numbers, dtype=float)[:, None]
    return Study(
        model="made up",
        weights="",
        layer_kinds=("full",) * layers,
        texts=n,
        names=tuple(map(str, range(n))),
        digests=("",) * n,
        probes=tuple(PROBES),
        metrics=tuple(METRICS),
        n_tokens=np.full(n, 9),
        values=values,
        status=np.where(np.isfinite(values), 0, 1).astype(np.uint8),
        documents=tuple(documents),
    )


def study_with_curves(run: Capture, *, protect_last: int = 0) -> Study:
    """The study that a run is, with its loss curves; norms and attention must give an order in every head."""
    curves = text_curves(run, protect_last=protect_last)
    assert (curves.status == "ok").all()
    return replace(
        studies.study_of(run),
        curves=curves.lost[None].astype(np.float32),
        curve_status=np.zeros((1, *curves.status.shape), np.uint8),
        curve_gammas=curves.gammas[None],
        protect_last=protect_last,
    )


def made_up(heads=4, kv_heads=2, n=12, dimensions=8, seed=0, **changes) -> HeadVectors:
    """Random queries [H, T, D] and keys [Hkv, T, D] of one layer."""
    rng = np.random.default_rng(seed)
    queries, keys = (rng.normal(size=(k, n, dimensions)).astype(np.float32) for k in (heads, kv_heads))
    given = dict(layer=0, queries=queries, keys=keys, scaling=0.4, softcap=None, sinks=None, window=0)
    return HeadVectors(**given | changes)
