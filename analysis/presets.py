"""Texts to start from, and the demo run that the app opens with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from analysis.models import BUNDLED

DEMO_RUN = BUNDLED / "demo.safetensors"
_TEXTS = BUNDLED / "texts"

PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PASSKEY_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True, slots=True)
class Preset:
    """A text with a name."""

    name: str
    text: str


def presets() -> tuple[Preset, ...]:
    """The texts that the app offers; the demo run is of the first."""
    return (
        Preset("Anne of Avonlea (L. M. Montgomery, 1909)", _read("anne.txt")),
        Preset("The Tomb of Keats (Oscar Wilde, 1877)", _read("keats.txt")),
        Preset("Passkey hidden in filler (the paper's task)", passkey(48213, before=4, after=6)),
    )


def passkey(key: int, *, before: int, after: int) -> str:
    """The paper's passkey prompt, with its filler repeated `before` and `after` times; what follows should be `key`."""
    return " ".join(
        [
            PASSKEY_TASK,
            *[PASSKEY_FILLER] * before,
            passkey_sentence(key),
            *[PASSKEY_FILLER] * after,
            PASSKEY_QUESTION,
        ]
    )


def passkey_sentence(key: int) -> str:
    """What is hidden in the filler."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def make_demo(ref: str, destination: Path = DEMO_RUN) -> Path:
    """Capture the first preset with a model, and save it as the run that the app opens with."""
    from analysis.capturing import capture
    from analysis.models import load_model
    from analysis.run import save_run

    return save_run(capture(load_model(ref, device="cpu"), presets()[0].text), destination)


def _read(name: str) -> str:
    return (_TEXTS / name).read_text(encoding="utf-8").strip()
