"""What a compression saves, by arithmetic, and how to write it as code: for this library, and for NVIDIA's kvpress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from analysis.memory import CacheShape
from analysis.plans.curves import BY_NORM
from l2kv.spec import CompressionSpec

LENGTHS = (4096, 32_768, 131_072)  # tokens, that savings are told at


@dataclass(frozen=True, slots=True)
class Saving:
    """What a spec saves at one length, for a batch of sequences: whole against compressed. Arithmetic, not measured."""

    n_tokens: int
    whole_bytes: int  # of the caches of the batch
    kept_bytes: int
    whole_fits: int | None  # sequences of this length that fit the GPU beside the weights; None: any number
    kept_fits: int | None
    whole_seconds: float  # a step of a dense model takes at least this: all weights, and caches, are read once
    kept_seconds: float


def savings(
    shape: CacheShape,
    spec: CompressionSpec,
    *,
    weights_bytes: int,
    gpu_bytes: int,
    bandwidth: float,
    lengths: Sequence[int] = LENGTHS,
    batch: int = 1,
) -> tuple[Saving, ...]:
    """Bytes, sequences that fit and the time that memory bandwidth allows a decoding step, at each length.

    Activations, the allocator's waste and layers with a sliding window (the same in both) are not counted, and nor is
    what it costs to find what to evict. The time is that of a dense model: a mixture of experts reads but some of its
    weights for a token, so its step may take less.

    Args:
        bandwidth: bytes a second that the GPU's memory delivers.
        lengths: tokens seen, of each sequence.
        batch: sequences that are decoded at once.

    Raises:
        ValueError: a number is not positive, or infinite, or no layer keeps every token.
    """
    if not shape.layers:
        raise ValueError("there is nothing to save: each layer has a sliding window, so its cache is bounded already")
    for name, value in (("gpu_bytes", gpu_bytes), ("bandwidth", bandwidth), ("batch", batch)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if weights_bytes < 0 or any(n < 1 for n in lengths):
        raise ValueError(f"weights_bytes and lengths must be positive, got {weights_bytes!r} and {tuple(lengths)!r}")
    room = max(gpu_bytes - weights_bytes, 0)
    rows = []
    for n in lengths:
        each = [shape.nbytes(n), shape.nbytes(n, spec)]
        fits = [room // size if size else None for size in each]
        seconds = [(weights_bytes + batch * size) / bandwidth for size in each]
        rows.append(Saving(n, batch * each[0], batch * each[1], *fits, *seconds))
    return tuple(rows)


def library_code(spec: CompressionSpec) -> str:
    """Python that decodes with a spec by this library; `model` and `inputs` are the reader's. Defaults are left out."""
    return (
        "from l2kv import CompressedCache, CompressionSpec, compressible\n\n"
        f"spec = CompressionSpec({', '.join(_arguments(spec))})\n"
        "with compressible(model):\n"
        "    model.generate(**inputs, past_key_values=CompressedCache(model.config, spec))\n"
    )


def _arguments(spec: CompressionSpec) -> list[str]:
    return [
        f"{field.name}={dict(value) if field.name in ('layer_ratios', 'head_ratios') else value!r}"
        for field in fields(spec)
        if (value := getattr(spec, field.name)) != field.default
    ]


def kvpress_code(spec: CompressionSpec, shape: CacheShape) -> str:
    """Python for NVIDIA's kvpress that comes nearest to a spec: the same share of pairs in all, by key norm.

    Comments in it say what of the spec kvpress's press of key norms cannot express.

    Raises:
        ValueError: the spec is not by key norm, or the shape has no layer that can be compressed.
    """
    if spec.policy not in BY_NORM:
        raise ValueError(f"kvpress_code is for key norms ({', '.join(BY_NORM)}), got {spec.policy!r}")
    targets = [spec.target_of(layer, head) for layer in shape.layers for head in range(shape.n_kv_heads)]
    if not targets:
        raise ValueError("no layer of this model can be compressed")
    ratio = sum(target.ratio for target in targets if target.budget is None) / len(targets)
    tokens = sum(target.budget or 0 for target in targets) / len(targets)
    lost = f"{min(1 - ratio, 0.9999):.4g}"  # kvpress refuses 1
    if tokens:
        lost = f"max(0.0, {1 - ratio:.4g} - {tokens:g} / n_tokens)"
    notes = [note for note, holds in _kvpress_cannot(spec) if holds]
    return (
        "".join(f"# {note}\n" for note in ["The nearest in kvpress; it rounds pairs down, l2kv up.", *notes])
        + "from kvpress import KnormPress\nfrom transformers import pipeline\n\n"
        + ("n_tokens = 4096  # of your context\n" if tokens else "")
        + f"press = KnormPress(compression_ratio={lost})\n"
        + 'pipe = pipeline("kv-press-text-generation", model="your/model", device_map="auto")\n'
        + "print(pipe(context, question=question, press=press)['answer'])\n"
    )


def _kvpress_cannot(spec: CompressionSpec) -> list[tuple[str, bool]]:
    """What is lost in kvpress, and whether the spec has it."""
    skipped = ", ".join(map(str, spec.skip_layers))
    return [
        ("It compresses once, after the prompt: what is generated is kept. l2kv evicts as tokens come.", True),
        (f"KnormPress keeps low norms everywhere; the spec's {spec.policy} keeps others.", spec.policy != "low_norm"),
        ("Ratios per kv head become one, of the same total.", spec.head_ratios is not None),
        ("Ratios per layer become one (PerLayerCompressionPress could tell).", spec.layer_ratios is not None),
        (f"Skipped layers ({skipped}) are compressed, the others less.", bool(spec.skip_layers)),
        (f"The first {spec.protect_first} tokens are not protected.", spec.protect_first > 0),
        (f"The last {spec.protect_last} tokens are not protected.", spec.protect_last > 0),
        (f"Caches under {spec.prune_after} tokens are not left alone.", spec.prune_after > 0),
        ("A ratio of the pairs held, anew each time, is not known.", spec.schedule == "reference"),
    ]
