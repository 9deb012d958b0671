"""The training loop: resumable at any moment, within a time, on a CPU or a GPU."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from analysis.errors import UserError
from analysis.models import LoadedModel, load_model
from analysis.training.corpus import Corpus, text_files, train_tokenizer
from analysis.training.episodes import Episodes
from analysis.training.recipe import Recipe, Shape
from analysis.training.witness import Record, record

Log = Callable[[str], None]
RECORD_NAME = "training.json"
_CHECKPOINT = "checkpoint.safetensors"
_PREFETCH = 4  # batches made ahead
_WORKERS = 2


def train(
    corpus_folder: Path,
    out: Path,
    recipe: Recipe,
    *,
    start_from: str | None = None,
    device: str | None = None,
    compiled: bool = False,
    record_every: int = 250,
    checkpoint_seconds: float = 120.0,
    witness_texts: int = 4,
    log: Log = print,
) -> Path:
    """Train a model on a folder of texts, or go on with a training that was stopped; returns `out`, a model folder.

    Args:
        corpus_folder: holds .txt or .txt.xz files.
        out: new, or of a training of the same recipe that was stopped: it then goes on from its last checkpoint.
        start_from: a model to go on with (its shape and tokenizer are taken, the recipe's shape is not); from scratch
            if not given.
        device: "cuda" or "cpu"; the GPU where there is one, if not given.
        compiled: compile the model first, which takes a minute, and a C++ compiler on a CPU.
        record_every: steps between two looks at the heads.
        log: called with each line of the log.

    Raises:
        UserError: the corpus cannot be read, `out` holds something else or cannot be written, or the device is not
            there.
    """
    if record_every < 1:
        raise UserError(f"record_every must be 1 step or more, got {record_every}")
    device = _device(device)
    _check_out(out)
    text_files(corpus_folder)  # before anything is made
    torch.manual_seed(recipe.seed)
    state = out / _CHECKPOINT
    goes_on = state.exists()
    start = _skeleton(out) if goes_on else _initial(corpus_folder, recipe, start_from, log)
    if not goes_on:
        _begin(out, start)
    model, tokenizer = start.model.to(device=device, dtype=torch.float32), start.tokenizer
    corpus = Corpus(corpus_folder, tokenizer, out / "tokens", on_file=lambda name: log(f"tokenising {name}"))
    run = _Run(model, recipe, start_from, corpus)
    if goes_on:
        run.load(state)
        log(f"going on from step {run.step}")
    loaded = LoadedModel(model, tokenizer, out.name)
    texts = corpus.held_out(witness_texts, recipe.length - 16)
    loss_of = torch.compile(_loss) if compiled else _loss
    log(
        f"{sum(p.numel() for p in model.parameters()):,} weights on {device}, {corpus.n_train:,} tokens to train on, "
        f"{recipe.batch * recipe.length:,} tokens a step"
    )

    saved = time.perf_counter()
    with _batches(recipe, corpus, first_step=run.step) as batches:
        while True:
            progress = recipe.progress(run.step, run.seconds)
            if run.step % record_every == 0 or progress >= 1:
                run.look(loaded, texts, log)
            if progress >= 1:
                break
            began = time.perf_counter()
            loss = _step(model, run.optimizer, next(batches), recipe, recipe.rate(run.step, progress), loss_of)
            run.advance(recipe.batch * recipe.length, time.perf_counter() - began, loss)
            if not math.isfinite(loss):
                raise UserError(f"The loss is {loss} at step {run.step}: lower the learning rate.")
            if run.step % 50 == 0:
                log(f"step {run.step}  loss {np.mean(run.losses[-50:]):.3f}  {run.tokens / run.seconds:,.0f} tokens/s")
            if time.perf_counter() - saved > checkpoint_seconds:
                run.save(state)
                saved = time.perf_counter()
    _export(run, loaded, out)
    state.unlink(missing_ok=True)
    return out


class _Run:
    """What changes in the course of a training, and has to be there again when it goes on."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, start_from: str | None, corpus: Corpus) -> None:
        self.model, self.recipe, self.start_from = model, recipe, start_from
        self.corpus = {"files": list(corpus.files), "tokens": corpus.n_train}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.decay, fused=True
        )
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.records: list[dict] = []
        self.losses: list[float] = []  # since the last record

    def advance(self, tokens: int, seconds: float, loss: float) -> None:
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.losses.append(loss)

    def look(self, loaded: LoadedModel, texts: list[str], log: Log) -> None:
        if self.records and self.records[-1]["step"] == self.step:
            return
        self.model.eval()
        seen: Record = record(
            loaded,
            texts,
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            loss=float(np.mean(self.losses)) if self.losses else None,
        )
        self.model.train()
        self.records.append(seen.to_json())
        self.losses.clear()
        gamma, bos_norm = np.array(seen.gamma, dtype=float), np.array(seen.bos_norm, dtype=float)
        log(
            f"step {self.step}: {seen.bits_per_byte:.3f} bits/byte held out, Γ {np.nanmin(gamma):+.2f} to "
            f"{np.nanmax(gamma):+.2f}, below 0 in {np.sum(gamma < 0)} of {gamma.size} heads, most on <s> "
            f"{np.max(seen.sink_share):.2f}, its key {np.nanmin(bos_norm):.2f} of the median"
        )

    def _recipe(self) -> dict:
        """The recipe; of a model that was started from, the shape is its own, and stands in its config."""
        return asdict(self.recipe) | ({"shape": None} if self.start_from else {})

    def report(self) -> dict:
        """Everything but the weights, as JSON."""
        return {
            "recipe": self._recipe(),
            "start_from": self.start_from,
            "corpus": self.corpus,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "device": _device_name(self.model.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "records": self.records,
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, weight in self.model.named_parameters():
            tensors[f"weight.{name}"] = weight.detach()
            for key, value in self.optimizer.state[weight].items():
                tensors[f"{key}.{name}"] = value
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        with _writing(path.parent):
            save_file(
                self._tensors(), part, metadata={"report": json.dumps(self.report()), "losses": json.dumps(self.losses)}
            )
            part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises UserError if it is of another training, or damaged."""
        try:
            with safe_open(path, "pt") as file:
                report, losses = (json.loads(file.metadata().get(name, "[]")) for name in ("report", "losses"))
                self._check_same(report, path)
                with torch.no_grad():
                    for name, weight in self.model.named_parameters():
                        weight.copy_(file.get_tensor(f"weight.{name}"))
                        self.optimizer.state[weight] = {
                            key: file.get_tensor(f"{key}.{name}").to(weight.device)
                            for key in ("step", "exp_avg", "exp_avg_sq")
                        }
            self.step, self.tokens, self.seconds = report["step"], report["tokens"], report["seconds"]
            self.records, self.losses = report["records"], losses
        except UserError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r:.200}). Remove it to begin again, or give another folder."
            ) from error

    def _check_same(self, report: dict, path: Path) -> None:
        differs = [
            what
            for what, then, now in (
                ("recipe", report["recipe"], json.loads(json.dumps(self._recipe()))),
                ("model to start from", report["start_from"], self.start_from),
                ("corpus", report.get("corpus", self.corpus), self.corpus),
            )
            if then != now
        ]
        if differs:
            raise UserError(
                f"{path.parent} holds a training of another {' and another '.join(differs)}, stopped at step "
                f"{report['step']}. Give another folder, or the same options again to go on with it."
            )


def _step(model, optimizer, batch: Tensor, recipe: Recipe, rate: float, loss_of) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch.to(model.device, non_blocking=True))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next token; batch [B, T + 1]."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class _batches:
    """Batches [B, T + 1] from `first_step` on, made ahead in other threads; each depends on seed and step alone."""

    def __init__(self, recipe: Recipe, corpus: Corpus, first_step: int) -> None:
        self._recipe, self._corpus, self._first = recipe, corpus, first_step
        self._episodes = Episodes(corpus)
        self._pool = ThreadPoolExecutor(_WORKERS)

    def __enter__(self) -> Iterator[Tensor]:
        return self._iterate()

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _iterate(self) -> Iterator[Tensor]:
        step = self._first
        ahead = deque(self._pool.submit(self._make, step + i) for i in range(_PREFETCH))
        while True:
            step += 1
            ahead.append(self._pool.submit(self._make, step + _PREFETCH - 1))
            yield ahead.popleft().result()

    def _make(self, step: int) -> Tensor:
        recipe, rng = self._recipe, np.random.default_rng((self._recipe.seed, step))
        start = np.array([self._corpus.tokenizer.bos_token_id])
        rows = []
        for _ in range(recipe.batch):
            source = self._episodes.sequence if rng.random() < recipe.synthetic else self._corpus.draw
            rows.append(np.concatenate([start, source(rng, recipe.length)]))
        return torch.from_numpy(np.stack(rows))


def _initial(corpus_folder: Path, recipe: Recipe, start_from: str | None, log: Log) -> LoadedModel:
    if start_from is not None:
        loaded = load_model(start_from, device="cpu", dtype=torch.float32)
        config = loaded.model.config
        config.max_position_embeddings = max(config.max_position_embeddings, recipe.length)
        loaded.tokenizer.model_max_length = config.max_position_embeddings
        return loaded
    log("learning a vocabulary")
    tokenizer = train_tokenizer(corpus_folder, recipe.shape.vocab_size)
    tokenizer.model_max_length = recipe.length
    config = _config(recipe.shape, recipe.length, tokenizer)
    return LoadedModel(LlamaForCausalLM(config), tokenizer, "new")


def _skeleton(out: Path) -> LoadedModel:
    """The model and the tokenizer of a training that was stopped, without its weights."""
    try:
        config = AutoConfig.from_pretrained(out, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
        return LoadedModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, out.name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out} holds a checkpoint, but no config or tokenizer that belong to it ({str(error)[:200]}). Give "
            "another folder."
        ) from error


def _device(name: str | None) -> str:
    """A device that is there: the one asked for, or the GPU if there is one. Raises UserError."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise UserError(f"There is no device {name!r} ({str(error).splitlines()[0][:100]}). Try cpu.") from error
    return name


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else than a training that was stopped."""
    if (out / _CHECKPOINT).exists():
        return
    if (out / RECORD_NAME).exists():
        raise UserError(f"{out} holds a finished training. Give another folder.")
    if found := sorted(path.name for path in out.glob("*.safetensors")):
        raise UserError(f"{out} holds a model already ({found[0]}). Give another folder.")


def _begin(out: Path, start: LoadedModel) -> None:
    """Write what does not change in the course of a training."""
    described = out / "tokenizer.json"
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        before = described.read_bytes() if described.exists() else None
        start.tokenizer.save_pretrained(out)
        start.model.config.save_pretrained(out)
        if before is not None and before != described.read_bytes():
            for stale in (out / "tokens").glob(
                "*.tokens"
            ):  # of a training that was stopped before its first checkpoint
                stale.unlink()


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written to ({error}). Make room, or give another folder.") from error


def _config(shape: Shape, length: int, tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def _export(run: _Run, loaded: LoadedModel, out: Path) -> None:
    """The model folder: bfloat16 weights, and the record of the training beside them."""
    report = json.dumps(run.report(), separators=(",", ":"))
    with _writing(out):
        loaded.model.to(torch.bfloat16).save_pretrained(out)
        (out / RECORD_NAME).write_text(report, encoding="utf-8")
        for weights in out.glob("model*.safetensors"):  # left as files that only their owner can read
            weights.chmod((out / RECORD_NAME).stat().st_mode)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
