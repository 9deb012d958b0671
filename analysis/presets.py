"""Texts to start from, and the demo run that the app opens with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from analysis.errors import RunFileError
from analysis.models import BUNDLED
from analysis.texts import read_text
from l2kv.spec import CompressionSpec

DEMO_RUN = BUNDLED / "demo.safetensors"
DEMO_STUDY = BUNDLED / "study.safetensors"
DEMO_FRONT = BUNDLED / "front.json"
DEMO_CAUSAL = BUNDLED / "causal.json"
FOUND_PRESETS = BUNDLED / "presets.json"
_TEXTS = BUNDLED / "texts"

PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PASSKEY_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_QUESTION = "What is the pass key? The pass key is"


FOUND_VERSION = 1


@dataclass(frozen=True, slots=True)
class Preset:
    """A text with a name, and for one that was found by a search what it shows and how."""

    name: str
    text: str
    why: str = ""  # what was measured on it, in words
    spec: CompressionSpec | None = None  # the compression to look at it with


@dataclass(frozen=True, slots=True)
class FoundPresets:
    """What `analysis.finding` has found for a model, as a file."""

    model: str  # its name
    presets: tuple[Preset, ...]
    without_passkey: bool = False  # no passkey was searched for, as was asked: the model is said not to find any

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "l2kv_presets": FOUND_VERSION,
            "model": self.model,
            "without_passkey": self.without_passkey,
            "presets": [
                {"name": preset.name, "why": preset.why, "spec": _spec_fields(preset.spec), "text": preset.text}
                for preset in self.presets
            ],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> FoundPresets:
        """Read the file's text. Raises RunFileError, with the reason."""
        try:
            content = json.loads(text)
            if content["l2kv_presets"] != FOUND_VERSION:
                raise ValueError(f"version {content['l2kv_presets']!r:.20} is not {FOUND_VERSION}")
            found = [
                Preset(item["name"], item["text"], item["why"], item["spec"] and CompressionSpec(**item["spec"]))
                for item in content["presets"]
            ]
            return cls(content["model"], tuple(found), content["without_passkey"])
        except (ValueError, TypeError, KeyError) as error:
            raise RunFileError(
                f"The presets cannot be read ({error}). Make them again: python -m analysis demo"
            ) from error


def presets(found: Path = FOUND_PRESETS) -> tuple[Preset, ...]:
    """The texts that the app offers; the demo run is of the first. Those found for the model come last, if any were.

    Raises:
        RunFileError: the file of those that were found is damaged.
    """
    texts = tuple(Preset(name, text) for name, text in bundled_texts().items())
    extra = FoundPresets.from_json(found.read_text(encoding="utf-8")).presets if found.exists() else ()
    if not any(PASSKEY_QUESTION in preset.text for preset in extra):
        extra += (Preset("Passkey hidden in filler (the paper's task)", passkey(48213, before=4, after=6)),)
    return texts + extra


def bundled_texts() -> Mapping[str, str]:
    """The texts that come with the program, by name. In the public domain, and by authors not trained on."""
    return {
        "Anne of Avonlea (L. M. Montgomery, 1909)": _read("anne.txt"),
        "The Tomb of Keats (Oscar Wilde, 1877)": _read("keats.txt"),
    }


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


def save_found(found: FoundPresets, destination: Path = FOUND_PRESETS) -> Path:
    """Write the presets that `presets()` reads. Raises RunFileError if they cannot be written there."""
    part = destination.with_suffix(".part")
    try:
        part.write_text(found.to_json(), encoding="utf-8")
        part.replace(destination)
    except OSError as error:
        raise RunFileError(f"The presets cannot be written to {destination} ({error}).") from error
    return destination


def _spec_fields(spec: CompressionSpec | None) -> dict[str, object] | None:
    """What has to be said of a spec: the main three, and whatever is not as by default."""
    if spec is None:
        return None
    main = ("keep_ratio", "policy", "protect_last")
    return {f.name: v for f in fields(spec) if (v := getattr(spec, f.name)) != f.default or f.name in main}


def _read(name: str) -> str:
    return read_text(_TEXTS / name).strip()
