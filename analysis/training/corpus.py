"""A folder of .txt or .txt.xz files as one long row of tokens. Knows text and tokenizers; knows no model.

Documents within a file are separated by a NUL byte. The tokens of each file are kept beside the training, in a file of
uint16, so that a run that is resumed does not make them again.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from analysis.errors import TextError, UserError

BOS, EOS = "<s>", "</s>"
_SAMPLE = 20_000_000  # characters that a vocabulary is learned from
_CHUNK = 1000  # documents tokenised at a time


class Corpus:
    """Tokens of a folder of texts. The last hundredth is held out, to measure on.

    Args:
        folder: holds .txt and .txt.xz files, UTF-8.
        tokenizer: of at most 65,536 tokens, with an end-of-text token.
        workspace: where the tokens are kept; made if it is not there.
        on_file: called with each file's name before it is tokenised.

    Raises:
        TextError: no such files, one that cannot be read, or too little text in them.
        UserError: the tokenizer has too many tokens, or none to begin or to end a text; the workspace is not writable.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        workspace: Path,
        on_file: Callable[[str], None] = lambda name: None,
    ) -> None:
        _check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        files = text_files(folder)
        self.files = tuple(path.name for path in files)
        self._shards = [_tokens_of(path, tokenizer, workspace, on_file) for path in files]
        ends = np.cumsum([len(shard) for shard in self._shards])
        self._starts, self._total = ends - [len(shard) for shard in self._shards], int(ends[-1])
        self.n_train = self._total - self._total // 100

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` consecutive tokens from anywhere in the part to train on, [n] int64."""
        self._check(n)
        return self._read(int(rng.integers(self.n_train - n + 1)), n)

    def held_out(self, count: int, n: int) -> list[str]:
        """`count` texts of `n` tokens or a little more, from the part that `draw` never reads."""
        room = (self._total - self.n_train) // count
        if room < n:
            raise TextError(
                f"Too little text: the hundredth that is held out has {self._total - self.n_train} tokens, not {count} "
                f"times {n}. Give more texts, or train on shorter sequences."
            )
        starts = [self.n_train + i * room for i in range(count)]
        return [self.tokenizer.decode(self._read(start, n), skip_special_tokens=True) for start in starts]

    def _check(self, n: int) -> None:
        if self.n_train < n:
            raise TextError(
                f"Too little text: {self.n_train} tokens to train on, and a sequence takes {n}. Give more texts, or "
                "train on shorter sequences."
            )

    def _read(self, start: int, n: int) -> np.ndarray:
        parts, shard = [np.empty(0, np.uint16)], int(np.searchsorted(self._starts, start, side="right")) - 1
        while n > 0:
            within = start - self._starts[shard]
            parts.append(self._shards[shard][within : within + n])
            n, start, shard = n - len(parts[-1]), start + len(parts[-1]), shard + 1
        return np.concatenate(parts).astype(np.int64)


def text_files(folder: Path) -> list[Path]:
    """The .txt and .txt.xz files of a folder, by name. Raises TextError if there is none."""
    if not folder.is_dir():
        raise TextError(f"There is no folder {folder}. Give one that holds .txt or .txt.xz files.")
    found = sorted(path for path in folder.glob("*") if path.name.endswith((".txt", ".txt.xz")))
    if not found:
        raise TextError(f"{folder} holds no .txt or .txt.xz files. Put the texts to train on there.")
    return found


def documents(path: Path) -> Iterator[str]:
    """The documents of a file that are not empty."""
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return (document for document in text.split("\0") if document.strip())


def train_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the first texts of each file: every digit a token, <s> before each text."""
    files = text_files(folder)
    sample = (text[: _SAMPLE // len(files)] for path in files for text in ["\n".join(documents(path))])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def _tokens_of(
    path: Path, tokenizer: PreTrainedTokenizerBase, workspace: Path, on_file: Callable[[str], None]
) -> np.ndarray:
    stored = workspace / f"{path.name}.tokens"
    try:
        if not stored.exists() or stored.stat().st_mtime < path.stat().st_mtime:
            on_file(path.name)
            workspace.mkdir(parents=True, exist_ok=True)
            _tokenise(path, tokenizer, stored)
        return np.memmap(stored, dtype=np.uint16, mode="r") if stored.stat().st_size else np.empty(0, np.uint16)
    except OSError as error:
        raise UserError(f"The tokens of {path.name} cannot be kept in {workspace} ({error}).") from error


def _tokenise(path: Path, tokenizer: PreTrainedTokenizerBase, stored: Path) -> None:
    texts, part = list(documents(path)), stored.with_suffix(".part")
    with part.open("wb") as file:
        for start in range(0, len(texts), _CHUNK):
            encoded = tokenizer(texts[start : start + _CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
            for ids in encoded:
                np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16).tofile(file)
    part.replace(stored)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > 1 << 16:
        raise UserError(f"The tokenizer has {len(tokenizer):,} tokens; models of up to {1 << 16:,} can be trained.")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no token that begins a text, or none that ends it. Start from another model."
        )
