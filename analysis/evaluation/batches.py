"""Which samples and specs are decoded as one batch. Knows what a cache holds by its config; runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import TypeAlias

from analysis.evaluation.task import Sample
from analysis.models.load import LoadedModel
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec
from l2kv.together import can_run_together

Specs: TypeAlias = tuple[CompressionSpec | None, ...]
"""What is run on the same samples; None is the full cache."""
TOKENS_AT_ONCE = 16384
"""Most tokens whose pairs a batch holds; in a full cache of a model of 7 billion weights they are 8 GiB."""


@dataclass(frozen=True, slots=True)
class Cells:
    """Samples of equal lengths by specs that are decoded as one batch: its rows, spec by spec."""

    samples: tuple[Sample, ...]
    specs: Specs

    def rows(self) -> Iterator[tuple[CompressionSpec | None, Sample]]:
        """Spec and sample of each row."""
        return product(self.specs, self.samples)


def cells_of(loaded: LoadedModel, samples: Sequence[Sample], specs: Specs) -> Iterator[list[Cells]]:
    """Divide samples by specs into batches to decode; those whose contexts are read in one pass come together.

    A batch depends on nothing but the model, the samples and the specs.
    """
    together, shape = can_run_together(loaded.config), CacheShape.of(loaded.config, 1)
    for batch in batches(samples):
        n = _tokens(batch[0])
        groups: list[list[CompressionSpec | None]] = []
        room = 0.0
        for spec in specs:
            tokens = len(batch) * n * shape.nbytes(n, spec) / max(1, shape.nbytes(n))
            if not (groups and together and tokens <= room):
                groups.append([])
                room = TOKENS_AT_ONCE
            groups[-1].append(spec)
            room -= tokens
        yield [Cells(tuple(batch), tuple(group)) for group in groups]


def batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Neighbours of equal lengths, whose contexts are read as one batch."""
    for _, alike in groupby(samples, lambda one: (len(one.target), len(one.context), len(one.question))):
        group = list(alike)
        rows = max(1, TOKENS_AT_ONCE // _tokens(group[0]))
        yield from (group[start : start + rows] for start in range(0, len(group), rows))


def _tokens(sample: Sample) -> int:
    """Number of tokens of a sample, with an answer at its longest."""
    return len(sample.context) + len(sample.question) + (len(sample.target) or sample.new_tokens)
