"""Presets with a task: prompts with a known answer, the caches that must find it, and those that must lose it.

A search tries all its candidates and takes the first that meets its criterion; how many met it is recorded with
it. All caches of a search protect the same tokens and skip the same layers, so what tells them apart is the policy or
the ratio. Each is asked as the page Generate does it: the question is in the prompt when that is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.demo.presets import Preset
from analysis.errors import UserError
from analysis.evaluation.passkey import passkey_text, passkeys
from analysis.evaluation.prompts import FOUND, can_chat, prompt_tokens
from analysis.evaluation.run import measure
from analysis.evaluation.task import Sample
from analysis.models.load import BUNDLED, LoadedModel
from analysis.progress import Progress, unheard
from l2kv import CompressionSpec

HALF = CompressionSpec(keep_ratio=0.5, skip_layers=(0, 1), protect_last=32)
"""Half the cache by low norm, as the paper's retrieval tasks have it: layers 0 and 1 skipped."""
QUARTER = replace(HALF, keep_ratio=0.25)
_FULL = {"the full cache": None}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its expected answer."""

    prompt: str
    answer: str
    chat: bool = False

    def sample(self, loaded: LoadedModel, name: str, *, new_tokens: int) -> Sample:
        """Make the sample that the page Generate runs: all of the prompt but its last token is compressed."""
        ids = prompt_tokens(loaded.tokenizer, self.prompt, chat=self.chat).ids
        return Sample(name, ids[:-1], ids[-1:], answer=self.answer, new_tokens=new_tokens)


@dataclass(frozen=True, slots=True)
class Search:
    """A search for a preset: the caches that must find its answer, and those that must lose it."""

    name: str
    claim: str  # in a sentence
    spec: CompressionSpec  # the compression that the preset is looked at with
    candidates: Callable[[LoadedModel], Sequence[Question]]
    found_by: Mapping[str, CompressionSpec | None]  # None is the full cache
    lost_by: Mapping[str, CompressionSpec]
    new_tokens: int = 12  # in which the answer must come

    @property
    def contrast(self) -> CompressionSpec | None:
        """A compression with the opposite outcome to `spec`."""
        others = self.lost_by if self.spec in self.found_by.values() else self.found_by
        return next((spec for spec in others.values() if spec is not None), None)


class NotFoundError(UserError):
    """No candidate meets a criterion; the message names the criterion and the best value."""


def find_task_presets(
    loaded: LoadedModel, searches: Sequence[Search] | None = None, *, progress: Progress = unheard
) -> tuple[Preset, ...]:
    """Find one preset for each search.

    Args:
        searches: `SEARCHES` by default; those that need a chat template are skipped where there is none.
        progress: counts answers, for each search.

    Raises:
        NotFoundError: no candidate meets the criterion of a search, which includes the full cache.
        TextError, ModelError, OutOfMemoryError: as `stream`.
    """
    presets = []
    for search in SEARCHES if searches is None else searches:
        questions = [q for q in search.candidates(loaded) if not q.chat or can_chat(loaded.tokenizer)]
        if questions:
            presets.append(_first(loaded, search, questions, progress))
    return tuple(presets)


def _first(loaded: LoadedModel, search: Search, questions: Sequence[Question], progress: Progress) -> Preset:
    methods = {**search.found_by, **search.lost_by}
    samples = [question.sample(loaded, str(i), new_tokens=search.new_tokens) for i, question in enumerate(questions)]
    rows = measure(loaded, samples, methods, scoring=FOUND, progress=progress)
    right = {(row.method, row.sample) for row in rows if bool(row.score) is (row.method in search.found_by)}
    meeting = [q for i, q in enumerate(questions) if all((name, str(i)) in right for name in methods)]
    if not meeting:
        told = "; ".join(
            f"{name} {'finds' if name in search.found_by else 'loses'} it in "
            f"{sum(method == name for method, _ in right)} of {len(questions)}"
            for name in methods
        )
        raise NotFoundError(
            f"None of {len(questions)} prompts meets the criterion of “{search.name}” in {loaded.name}: {told}. For a "
            "model that solves no such task, say so: --without-tasks"
        )
    chosen = meeting[0]
    why = (
        f"{search.claim} This prompt was picked: in {loaded.name} {len(meeting)} of {len(questions)} tried "
        f"show{'s' * (len(meeting) == 1)} this."
    )
    return Preset(search.name, chosen.prompt, why, search.spec, chosen.answer, chosen.chat, search.contrast)


def _passkeys(loaded: LoadedModel) -> list[Question]:
    return [
        Question(passkey_text(loaded.tokenizer, key, n_tokens=length, depth=depth), str(key))
        for length in (450, 700)
        for depth in (0.25, 0.5, 0.75)
        for key in passkeys(2)
        if length + 12 <= loaded.positions
    ]


def _library(loaded: LoadedModel) -> list[Question]:
    text = _read("library.txt")
    asked = {
        "Until when is the library open on Thursdays?": "eight",
        "Who looks after the old maps?": "Okafor",
        "Which bus stops in front of the library?": "27",
        "How many books can you borrow at once?": "fifteen",
        "How much does a card cost a year?": "twelve",
        "From which year is the printing press?": "1884",
    }
    return [Question(f"{text}\n\n{question}", answer, chat=True) for question, answer in asked.items()]


def _constants(loaded: LoadedModel) -> list[Question]:
    text = _read("delivery.py.txt")
    asked = {
        'def test_delivery_to_germany():\n    # COUNTRIES["DE"] is': "480",
        "def test_free_delivery():\n    # FREE_FROM is": "4500",
        "def test_heavy_parcels():\n    # MAX_WEIGHT is": "31500",
        "def test_express():\n    # EXPRESS_FEE is": "990",
        'def test_delivery_to_austria():\n    assert COUNTRIES["AT"] ==': "610",
        'def test_delivery_to_the_netherlands():\n    assert COUNTRIES["NL"] ==': "350",
        "def test_free_delivery():\n    assert FREE_FROM ==": "4500",
    }
    return [Question(f"{text}\n\n\n{ending}", answer) for ending, answer in asked.items()]


def _read(name: str) -> str:
    return (Path(BUNDLED) / "texts" / name).read_text(encoding="utf-8").strip()


SEARCHES = (
    Search(
        "Passkey: found with half the cache",
        "Half the cache by low norm still holds the key; half of it at random or by high norm does not.",
        HALF,
        _passkeys,
        found_by=_FULL | {"low norm": HALF},
        lost_by={"random": replace(HALF, policy="random"), "high norm": replace(HALF, policy="high_norm")},
    ),
    Search(
        "Passkey: lost with a quarter, unless KeyDiff chooses",
        "A quarter of the cache by low norm loses the key; a quarter by KeyDiff still holds it.",
        QUARTER,
        _passkeys,
        found_by=_FULL | {"KeyDiff": replace(QUARTER, policy="keydiff")},
        lost_by={"low norm": QUARTER},
    ),
    Search(
        "Chat: a question about a page of text",
        "Half the cache by low norm still answers the question, as the full cache does; half of it at random does not.",
        HALF,
        _library,
        found_by=_FULL | {"low norm": HALF},
        lost_by={"random": replace(HALF, policy="random")},
        new_tokens=32,
    ),
    Search(
        "Code: a constant that half the cache forgets",
        "The full cache remembers the constant's value; half the cache by low norm does not.",
        HALF,
        _constants,
        found_by=_FULL,
        lost_by={"low norm": HALF},
    ),
)
