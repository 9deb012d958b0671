"""One model in memory, and one session at a time at work with it, in the order they came. No widgets.

torch and transformers are imported when a model is first asked for, not before.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import ModelError
from analysis.models.load import (
    NAMED_MODELS,
    check_spelling,
    load_model,
    loading_note,
    model_config,
    model_folder,
    outline,
    tokenizer_and_config,
)
from analysis.models.packaged import PACKAGED, is_fetched
from analysis.progress import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from analysis.models.load import LoadedModel


class Engine:
    """Turns at the model: one session has it at a time. A closed tab gives up its turn at its next step.

    Args:
        any_folder: whether models may be anywhere on this machine, not only in folders that the operator allowed: right
            for an app that only this machine can reach.
    """

    def __init__(self, *, any_folder: bool = False) -> None:
        self._any_folder = any_folder
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()
        self._loaded: LoadedModel | None = None
        self._ref: str | None = None
        self._configs: dict[str, PretrainedConfig] = {}

    @property
    def loaded(self) -> LoadedModel | None:
        """The resident model."""
        return self._loaded

    @property
    def ref(self) -> str | None:
        """Reference of the resident model."""
        return self._ref

    @property
    def waiting(self) -> int:
        """Number of sessions at work or in the queue."""
        return len(self._queue)

    def tokenizer_and_config(self, ref: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig] | None:
        """Tokenizer and config of the resident model, or of one on this machine; None if it has to be fetched first."""
        if self._loaded is not None and self._ref == ref:
            return self._loaded.tokenizer, self._loaded.config
        return _tokenizer_and_config(ref) if self._is_here(ref) else None

    def config(self, ref: str) -> PretrainedConfig | None:
        """Config of a model that is on this machine or was checked; None if it has to be fetched first."""
        if self._loaded is not None and self._ref == ref:
            return self._loaded.config
        if ref not in self._configs and self._is_here(ref):
            self._configs[ref] = model_config(ref)
        return self._configs.get(ref)

    def outline(self, ref: str) -> LoadedModel | None:
        """The resident model, or one on this machine without its weights; None if it has to be fetched first.

        Raises ModelError, as `analysis.models.load.outline`.
        """
        if self._loaded is not None and self._ref == ref:
            return self._loaded
        return _outline(ref) if self._is_here(ref) else None

    @contextmanager
    def turn(
        self, ref: str, *, on_wait: Callable[[int], object], on_load: Callable[[], object]
    ) -> Iterator[LoadedModel]:
        """Lend the model `ref` for the block, once all earlier sessions are done.

        Args:
            on_wait: called a few times a second with the number of sessions ahead; an exception gives up the place.
            on_load: called before a model is loaded.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
        try:
            while ahead := self._ahead_of(ticket):
                on_wait(ahead)
            if self._ref != ref:
                on_load()
                self._unload()  # first: two models may not fit
                self._loaded, self._ref = load_model(ref), ref
            assert self._loaded is not None
            yield self._loaded
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    @contextmanager
    def lend(self, ref: str, progress: Progress) -> Iterator[LoadedModel]:
        """Take a `turn` with a model that a user named; it is found, fetched or refused before anyone waits for it.

        Args:
            progress: called with the name of each stage, without a count; an exception gives up.

        Raises:
            ModelError: the model is not allowed, does not exist, or cannot be loaded.
        """
        ref = check_allowed(ref, any_folder=self._any_folder)

        def fetching(done: int, total: int, what: str) -> None:
            progress(0, 0, f"{what}: {done / total:.0%}")

        model_folder(ref, progress=fetching)
        with self.turn(
            ref,
            on_wait=lambda ahead: progress(0, 0, f"Waiting: {ahead} ahead of you"),
            on_load=lambda: progress(0, 0, f"Loading {ref} … {loading_note(ref)}"),
        ) as loaded:
            progress(0, 0, "Running …")
            yield loaded

    def check(self, ref: str) -> str:
        """Check that the app may load a model, and can as far as its config tells; return its name, id or path.

        Raises ModelError, as `check_allowed` and `model_config`.
        """
        ref = check_allowed(ref, any_folder=self._any_folder)
        if ref not in PACKAGED:
            self._configs[ref] = model_config(ref)
        return ref

    def known_models(self, refs: Iterable[str]) -> list[str]:
        """List `allowed_models`, and of folders and files that were used before those that are still there."""
        offered = allowed_models()
        return offered + [ref for ref in refs if ref not in offered and self._is_here(ref)]

    def _is_here(self, ref: str) -> bool:
        """Tell whether a model needs no hub, and may be loaded."""
        if packaged := PACKAGED.get(ref):
            return is_fetched(packaged)
        with suppress(ModelError):
            return ref in NAMED_MODELS or Path(check_allowed(ref, any_folder=self._any_folder)).is_absolute()
        return False

    def _ahead_of(self, ticket: object) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._queue[0] is ticket, timeout=0.3)
            return self._queue.index(ticket)

    def _unload(self) -> None:
        self._loaded = self._ref = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def allowed_models() -> list[str]:
    """List the models that need no hub: bundled ones, and those in the folders that the operator allowed.

    A GGUF file may lie two folders deeper: LM Studio has them by maker and model.
    """
    found = []
    for root in _allowed_folders():
        found += [folder for folder in sorted([root, *root.iterdir()]) if (folder / "config.json").is_file()]
        files = sorted(file for deep in ("", "*/", "*/*/") for file in root.glob(f"{deep}*.gguf"))
        found += [file for file in files if file.is_file() and file.resolve().is_relative_to(root)]
    return [*NAMED_MODELS, *map(str, found)]


def check_allowed(ref: str, *, any_folder: bool = False) -> str:
    """Check that a model is bundled, in an allowed folder (or in any), or a hub id. Raises ModelError for others."""
    ref = ref.strip()
    if ref in NAMED_MODELS:
        return ref
    check_spelling(ref)
    try:
        path = Path(ref).expanduser()
        is_path = path.is_absolute() or ref.startswith((".", "~")) or ref.count("/") > 1 or path.exists()
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown home, a NUL byte
        raise ModelError(f"{ref[:60]!r} is neither the id of a model nor a folder or file.") from error
    if not is_path:
        return ref
    if not (any_folder and resolved.exists()) and not any(resolved.is_relative_to(r) for r in _allowed_folders()):
        if any_folder:
            raise ModelError(f"There is no folder or file {ref}.")
        raise ModelError(
            "Local folders and files must be allowed by whoever runs the app: start it with the environment variable "
            "L2KV_MODEL_DIRS set to the folder that holds your models."
        )
    return str(resolved)


@lru_cache(maxsize=8)
def _tokenizer_and_config(ref: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    return tokenizer_and_config(ref)


@lru_cache(maxsize=2)
def _outline(ref: str) -> LoadedModel:
    return outline(ref)


def _allowed_folders() -> list[Path]:
    folders = os.environ.get("L2KV_MODEL_DIRS", "").split(os.pathsep)
    return [Path(f).expanduser().resolve() for f in folders if f and Path(f).expanduser().is_dir()]
