"""Stories: a generation over several caches side by side, recorded, its task scored. A story replays with no model.

Every step of every cache is in it: its text, what it holds, and how many heads still hold each token of the prompt.
`analysis.demo.telling` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.evaluation.prompts import decided, found
from analysis.models.memory import DTYPES
from analysis.records import record
from analysis.sampling import GREEDY, Sampling
from analysis.words import counted
from l2kv.spec import CompressionSpec

FULL = "full cache"
MOST_COUNTED = 4000
"""Most tokens of a text for which the heads that hold each are counted, which takes time at every step."""


def name_of(spec: CompressionSpec) -> str:
    """Name a compressed cache: "low norm, 50% kept"."""
    kept = f"{spec.keep_ratio:.0%} kept" if spec.budget is None else f"{counted(spec.budget, 'token')} kept"
    by = " by kv head" if spec.head_ratios else " by layer" if spec.layer_ratios else ""
    bits = [f", {what}s in {n} bits" for what, n in (("key", spec.key_bits), ("value", spec.value_bits)) if n]
    return f"{spec.policy.replace('_', ' ')}, {kept}{by}{''.join(bits)}"


@dataclass(frozen=True, slots=True)
class Step:
    """A new token, and the state of the cache after it."""

    token_ids: tuple[int, ...]
    """All new tokens."""
    seen: int
    """Number of tokens that the cache has seen, evicted or not."""
    text: str
    """All new tokens, without special ones such as the end token."""
    held: tuple[int, ...]
    """Tokens in the cache, per layer, in the kv head that holds most."""
    nbytes: int
    """Bytes of the keys and values of those tokens."""
    slack_nbytes: int = 0
    """Bytes of storage reserved for more."""
    finished: bool = False
    """The model ended its text here."""
    kept: tuple[int, ...] = ()
    """For each token read before the first new one the number of kv heads that hold it; empty if not counted."""


def full_nbytes(full: Step, seen: int) -> float:
    """Bytes of the full cache had it seen so many tokens, by its layers: one with a sliding window does not grow."""
    held = (seen if n == full.seen else min(n, seen) for n in full.held)
    return full.nbytes * sum(held) / sum(full.held)


@dataclass(frozen=True, slots=True)
class Told:
    """One of the caches of a story."""

    name: str
    spec: CompressionSpec | None
    """None is the full cache."""
    steps: tuple[Step, ...] = ()
    tokens_per_second: float | None = None
    """Median rate of decoding, in a run of its own; None where it was not measured."""
    labels: tuple[str, ...] = ()
    """Tokens that it had read, in a chat: earlier turns with its own answers, and the prompt. Else empty."""


@record("story", version=1, title="a story", again="l2kv demo", lines="caches")
@dataclass(frozen=True, slots=True)
class Story:
    """What several caches made of one prompt, token by token. The first is the full cache."""

    model: str
    name: str
    prompt: str
    caches: tuple[Told, ...]
    why: str = ""
    """What it shows, in words."""
    answer: str = ""
    """The expected answer, as `prompts.found` scores it; empty: nothing is right or wrong."""
    chat: bool = False
    labels: tuple[str, ...] = ()
    """Tokens of the prompt, for readers."""
    answer_at: tuple[int, ...] = ()
    """Positions of the tokens of the prompt that say the answer."""
    heads: int = 0
    """Number of kv heads in the layers that may evict."""
    counted_dtype: str = "float32"
    """Dtype that the model was run in, and bytes were counted in."""
    dtype: str = "float32"
    """Dtype of the checkpoint, which bytes are told in."""
    ended: bool = True
    """It was told to its end, and not stopped."""
    sampling: Sampling = GREEDY
    """How its tokens were drawn."""

    @property
    def n_steps(self) -> int:
        """Number of new tokens of the cache that wrote most."""
        return max((len(cache.steps) for cache in self.caches), default=0)

    def at(self, cache: int, step: int) -> Step:
        """State of a cache after a step; one that has finished waits for the others."""
        steps = self.caches[cache].steps
        return steps[min(step, len(steps) - 1)]

    def nbytes(self, cache: int, step: int) -> float:
        """Bytes of a cache after a step, in `dtype`."""
        return self.at(cache, step).nbytes * DTYPES[self.dtype] / DTYPES[self.counted_dtype]

    def share(self, cache: int, step: int) -> float:
        """Bytes of a cache as a share of a full one's that has seen as many tokens."""
        return self.nbytes(cache, step) / self.full_nbytes(cache, step)

    def full_nbytes(self, cache: int, step: int) -> float:
        """Bytes in `dtype` of a full cache that has seen as many tokens as a cache after a step."""
        now = self.at(cache, step)
        full = full_nbytes(self.at(0, len(now.token_ids) - 1), now.seen)
        return full * DTYPES[self.dtype] / DTYPES[self.counted_dtype]

    def score(self, cache: int, step: int) -> bool | None:
        """Tell whether a cache has given the answer; None while that is open, or where there is none."""
        if not self.answer:
            return None
        step_ = self.at(cache, step)
        if found(self.answer, step_.text):
            return True
        at_its_end = self.ended and step >= self.n_steps - 1
        return False if at_its_end or step_.finished or decided(self.answer, step_.text) else None

    def answer_held(self, cache: int, step: int) -> float | None:
        """Share of the heads that hold the answer's tokens in the prompt, their mean; None where none say it."""
        kept = self.at(cache, step).kept
        if not self.answer_at or not kept or not self.heads:
            return None
        return sum(kept[i] for i in self.answer_at) / len(self.answer_at) / self.heads

    def agreement(self, cache: int) -> tuple[int, int]:
        """Number of new tokens that a cache shares with the full one at the same place, and of those compared."""
        full, other = (self.at(i, self.n_steps - 1).token_ids for i in (0, cache))
        return sum(a == b for a, b in zip(full, other, strict=False)), len(full)
