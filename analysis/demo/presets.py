"""Texts to start from, and the bundled results of each model: a demo run, a study, presets, ..."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis.evaluation.passkey import QUESTION
from analysis.models.load import BUNDLED
from analysis.records import load, record
from analysis.texts.read import read_text
from l2kv.spec import CompressionSpec

BUNDLED_RUNS = ("smollm2", "books-5m")
"""Models of which a run comes with the program: a real one, and a small one in which the opposite holds."""
RESULT_FILES = {
    "demo": "demo.safetensors",
    "study": "study.safetensors",
    "front": "front.json",
    "ablation": "causal.json",
    "presets": "presets.json",
    "plan": "plan.json",
    "lm": "lm.jsonl",
    "passkey": "passkey.jsonl",
    "needle": "needle.jsonl",
    "timeline": "timeline.safetensors",
}
STORY_FILES = "story-{}.json"
_TEXTS = BUNDLED / "texts"


@dataclass(frozen=True, slots=True)
class Preset:
    """A named text; for one that a search found, what it shows and under which compression."""

    name: str
    text: str
    why: str = ""  # measurement that it was chosen by, in words
    spec: CompressionSpec | None = None  # the compression to look at it with
    answer: str = ""  # what should be generated, as `prompts.found` scores it; empty: nothing is right or wrong
    chat: bool = False  # a question, to be put through the model's chat template
    beside: CompressionSpec | None = None  # another one of the same protection, in which the task ends otherwise

    @property
    def parts(self) -> tuple[str, str, str]:
        """Its text without the question of a passkey, that question, and the answer as a continuation; or empty."""
        prompt = self.text.removesuffix(f" {QUESTION}")
        return prompt, self.text[len(prompt) :], f" {self.answer}" if self.answer else ""


@record("presets", version=1, title="a file of presets", again="l2kv demo")
@dataclass(frozen=True, slots=True)
class FoundPresets:
    """Presets that `analysis.demo.finding` found for a model, as a file."""

    model: str  # its name
    presets: tuple[Preset, ...]


@dataclass(frozen=True, slots=True)
class BundledResults:
    """Files of one model's bundled results; None where a result is not bundled."""

    demo: Path | None = None  # a run
    study: Path | None = None
    front: Path | None = None
    ablation: Path | None = None
    presets: Path | None = None
    plan: Path | None = None
    lm: Path | None = None  # results of this task, and of the next two
    passkey: Path | None = None
    needle: Path | None = None
    timeline: Path | None = None
    stories: tuple[Path, ...] = ()


def bundled_results(model: str) -> BundledResults:
    """Find the bundled results of a model by its name; there are none for an unknown name."""
    if model not in {folder.name for folder in BUNDLED.iterdir()}:
        return BundledResults()
    files = {kind: BUNDLED / model / name for kind, name in RESULT_FILES.items()}
    here = {kind: file for kind, file in files.items() if file.is_file()}
    return BundledResults(**here, stories=tuple(sorted((BUNDLED / model).glob(STORY_FILES.format("*")))))


def demo_model() -> str:
    """Name of the model whose run the app opens with: `L2KV_DEMO` if it is one of `BUNDLED_RUNS`, else the first."""
    named = os.environ.get("L2KV_DEMO", "")
    return named if named in BUNDLED_RUNS else BUNDLED_RUNS[0]


def presets(model: str, file: Path | None = None) -> tuple[Preset, ...]:
    """List the texts that the app offers for a model, by its name: plain ones, and those found for this model.

    A demo run is of the first. What was found for a model shows something there, and a task is one that its full cache
    solves; for another model neither need be so.

    Args:
        file: presets found for the model; by default the bundled file.

    Raises:
        RecordError: the file of presets is damaged.
    """
    texts = tuple(Preset(name, text) for name, text in bundled_texts().items())
    file = file or bundled_results(model).presets
    if file is None:
        return texts
    found = load(FoundPresets, file)
    return texts + (found.presets if found.model == model else ())


def bundled_texts() -> Mapping[str, str]:
    """Read the bundled texts, by name: public domain, by authors on whom `books-5m` was not trained."""
    return {
        "Anne of Avonlea (L. M. Montgomery, 1909)": _read("anne.txt"),
        "The Tomb of Keats (Oscar Wilde, 1877)": _read("keats.txt"),
    }


def bundled_prose() -> Mapping[str, str]:
    """Read sixteen bundled excerpts of some 5,000 characters, by name: enough to plan on half and measure on the rest.

    They are in the public domain, by the authors of `bundled_texts` (seven works of Wilde's and three of Montgomery's
    novels).
    """
    return {file.stem: _read(f"prose/{file.name}") for file in sorted((_TEXTS / "prose").glob("*.txt"))}


def _read(name: str) -> str:
    return read_text(_TEXTS / name).strip()
