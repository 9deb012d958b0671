"""Stories: a generation over several caches side by side, recorded, its task scored. A story replays with no model.

Every step of every cache is in it: its text, what it holds, and how many heads still hold each token of the prompt.
`analysis.demo.telling` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.evaluation.prompts import decided, found
from analysis.models.memory import DTYPES
from analysis.records import record
from analysis.sampling import GREEDY, Sampling
from analysis.words import capitalised, counted, layers_listed, percent
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

FULL = "full cache"
TIMED = 24
"""New tokens that a cache is timed by."""
MOST_COUNTED = 4000
"""Most tokens of a text for which the heads that hold each are counted, which takes time at every step."""


def name_of(spec: CompressionSpec) -> str:
    """Name a compressed cache: "low norm, 50 % kept"."""
    kept = f"{percent(spec.keep_ratio)} kept" if spec.budget is None else f"{counted(spec.budget, 'token')} kept"
    by = " by kv head" if spec.head_ratios else " by layer" if spec.layer_ratios else ""
    bits = [f", {what}s in {n} bits" for what, n in (("key", spec.key_bits), ("value", spec.value_bits)) if n]
    policy = POLICIES[spec.policy].in_words if spec.policy in POLICIES else spec.policy
    return f"{policy}, {kept}{by}{''.join(bits)}"


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

    @property
    def title(self) -> str:
        """Its name as of today, as a heading: records made earlier may have another."""
        return capitalised(self.name if self.spec is None else name_of(self.spec))

    @property
    def keeps(self) -> str:
        """What its policy keeps, in a few words; empty for a policy that is not known here."""
        if self.spec is None:
            return "Keeps every token"
        about = POLICIES[self.spec.policy].about if self.spec.policy in POLICIES else ""
        return about.partition(" (")[0].partition(":")[0].rstrip(".").replace("Keep ", "Keeps ", 1)


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

    @property
    def told_apart(self) -> bool:
        """Tell whether rates of decoding differ more from the full cache's than between caches of the same bytes."""
        full, *others = (cache.tokens_per_second for cache in self.caches)
        sizes = [self.nbytes(i, 0) for i in range(1, len(self.caches))]
        if not full or not all(others) or len(others) < 2 or max(sizes) > 1.01 * min(sizes):
            return False
        rates = [rate for rate in others if rate]
        gains = [max(rate / full, full / rate) for rate in rates]
        return max(rates) / min(rates) < min(gains)


def introduction(story: Story) -> tuple[str, ...]:
    """Write for readers who know nothing of caches what a story is about: a few sentences."""
    read = f"a text of {counted(story.at(0, 0).seen, 'token')} (words or pieces of words)"
    what = "number" if story.answer.isdigit() else "phrase"
    if not story.answer:
        asked = f"The model reads {read} and {'answers it' if story.chat else 'writes on'}."
    elif story.answer_at:
        asked = f"A {what}, {story.answer}, is hidden in {read}; then the model is asked for it."
    else:
        asked = f"The model reads {read} and is asked for a {what}: {story.answer}."
    specs = [cache.spec for cache in story.caches if cache.spec]
    memory = (
        "A cache is the model's memory of what it read: a key and a value for each token. A key's length is its norm. "
        f"The full cache keeps every token, {_kept(specs)}."
    )
    return tuple(filter(None, (asked, memory, story.why)))


def _kept(specs: Sequence[CompressionSpec]) -> str:
    """Say what compressed caches keep, as far as it is the same in all."""
    ratios = {None if spec.budget or spec.layer_ratios or spec.head_ratios else spec.keep_ratio for spec in specs}
    ratio = ratios.pop() if len(ratios) == 1 else None
    words = [
        f"{'each other one' if len(specs) > 1 else 'the other one'} {percent(ratio) if ratio else 'a part of them'}"
    ]
    if len(skipped := {spec.skip_layers for spec in specs}) == 1 and (layers := skipped.pop()):
        words.append(f"but all in {layers_listed(layers)}")
    if len(protected := {spec.protect_last for spec in specs}) == 1 and (last := protected.pop()):
        words.append(f"and always the last {last}")
    return ", ".join(words)
