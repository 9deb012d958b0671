"""The model card: what `training.json` says of how a model came to be, and what was measured on it. No other claims.

Data, licence and notes are the words of whoever trained it: the card passes them on, or says that they were not stated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.errors import UserError
from analysis.evaluation import PasskeyScore
from analysis.measures import WEAK, signed
from analysis.models import LoadedModel, load_model
from analysis.training.loop import RECORD_NAME
from analysis.training.measured import FULL, Effort, Heads, Measured, OnStage, measure

CARD_NAME = "README.md"
FIGURES_NAME = "card.json"
_CARD_VERSION = 1


@dataclass(frozen=True, slots=True)
class Stated:
    """What no measurement tells."""

    data: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """How a model came to be, as its `training.json` says."""

    start_from: str | None
    steps: int
    tokens: int
    seconds: float
    device: str
    torch: str
    transformers: str
    recipe: tuple[tuple[str, str], ...]  # name, value; without the shape
    synthetic: float
    held_out_bits: float | None  # of the last look at the heads
    corpus: str  # files and tokens; empty: was not recorded

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """Raises UserError if the folder has no record of a training that can be read."""
        path = folder / RECORD_NAME
        if not path.is_file():
            raise UserError(f"{folder} holds no {RECORD_NAME}: a card is made of a folder that `train` has finished.")
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            recipe, corpus = report["recipe"], report.get("corpus")
            return cls(
                start_from=report["start_from"],
                steps=int(report["step"]),
                tokens=int(report["tokens"]),
                seconds=float(report["seconds"]),
                device=str(report["device"]),
                torch=str(report["torch"]),
                transformers=str(report["transformers"]),
                recipe=tuple((name, str(v)) for name, v in recipe.items() if name != "shape" and v is not None),
                synthetic=float(recipe["synthetic"]),
                held_out_bits=report["records"][-1]["bits_per_byte"] if report["records"] else None,
                corpus=f"{len(corpus['files'])} files of texts, {corpus['tokens']:,} tokens" if corpus else "",
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{path} cannot be read as the record of a training ({error!r:.200}).") from error


def make_card(
    folder: Path,
    texts: Mapping[str, str],
    stated: Stated,
    *,
    device: str | None = None,
    effort: Effort | None = None,
    on_stage: OnStage = lambda stage, done, total: None,
) -> Path:
    """Measure the model of a folder that `train` wrote, and write its card and `card.json` there; returns the card.

    Raises:
        UserError: no record of a training, a model that cannot be loaded, texts too short, or no right to write.
    """
    origin = Origin.read(folder)
    loaded = load_model(folder, device=device)
    measured = measure(loaded, texts, effort=effort, on_stage=on_stage)
    figures = {"l2kv_card": _CARD_VERSION, "model": loaded.name} | asdict(measured)
    card = render(loaded, origin, measured, stated)
    try:
        (folder / FIGURES_NAME).write_text(json.dumps(figures, ensure_ascii=False, default=str) + "\n", "utf-8")
        (folder / CARD_NAME).write_text(card, "utf-8")
    except OSError as error:
        raise UserError(f"The card cannot be written to {folder} ({error}). Make the folder writable.") from error
    return folder / CARD_NAME


def render(loaded: LoadedModel, origin: Origin, measured: Measured, stated: Stated) -> str:
    """The card as Markdown."""
    notes = [f"## Note\n\n{note.strip()}" for note in stated.notes if note.strip()]
    parts = [
        f"# {loaded.name}",
        _what_it_is(loaded),
        _training(origin, stated),
        _how_measured(loaded, measured),
        _bits_table(measured),
        _passkey_tables(measured),
        _nll_table(measured),
        _heads_table(measured.heads),
        _samples(measured),
        *notes,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(loaded: LoadedModel) -> str:
    config, model = loaded.config, loaded.model
    weights = sum(p.numel() for p in model.parameters())
    tied = "tied" if config.tie_word_embeddings else "not tied"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        f"{type(model).__name__}, {weights:,} weights (embeddings {tied}): {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {config.num_attention_heads} query and {config.num_key_value_heads} kv heads, head_dim "
        f"{head_dim}, MLP {config.intermediate_size}, vocabulary {config.vocab_size}, {config.max_position_embeddings} "
        "positions."
    )


def _training(origin: Origin, stated: Stated) -> str:
    start = "from scratch"
    if origin.start_from is not None:
        start = (
            f"from the weights of `{_without_folders(origin.start_from)}`, whose own training is not counted in the "
            "figures of this section"
        )
    synthetic = "No synthetic sequences were mixed in."
    if origin.synthetic:
        synthetic = (
            f"Of the sequences, {origin.synthetic:.0%}, drawn at random, are synthetic: passkeys, needles and copies "
            "of random tokens, digits and book text. The passkey's words and, half the time, its filler are those of "
            "the evaluation below; the numbers, depths and lengths were drawn at random."
        )
    lines = [
        "## Training",
        f"Started {start}: {origin.steps:,} steps, {origin.tokens:,} tokens, {origin.seconds / 60:.1f} minutes on "
        f"{origin.device} (torch {origin.torch}, transformers {origin.transformers}).",
        f"Data: {_stated(stated.data)}" + (f" In {origin.corpus} to train on." if origin.corpus else ""),
        synthetic,
        f"Licence: {_stated(stated.licence)}",
        "Recipe (AdamW on all weights; the command is `python -m analysis train`): "
        + ", ".join(f"{name} {value}" for name, value in origin.recipe)
        + ".",
    ]
    if origin.held_out_bits is not None:
        lines.append(
            f"At its last step, {origin.held_out_bits:.3f} bits per byte on a few texts from the hundredth of the "
            "corpus that was held out. All other figures, and those of the heads as they grew, are in "
            f"`{RECORD_NAME}`."
        )
    return "\n\n".join(lines)


def _stated(words: str) -> str:
    return f"{words.strip().rstrip('.') or 'not stated'}."


def _without_folders(ref: str) -> str:
    """A model by its name: where it lay on the machine that trained is nobody's business."""
    return Path(ref).name if Path(ref).is_absolute() or ref.startswith((".", "~")) else ref


def _how_measured(loaded: LoadedModel, measured: Measured) -> str:
    return (
        "## Measured\n\n"
        f"By `python -m analysis card`, in {measured.dtype} on {measured.device} (torch {measured.torch}, transformers "
        f"{measured.transformers}); all figures are in `{FIGURES_NAME}`. That the texts were not trained on is not "
        "checked here."
    )


def _bits_table(measured: Measured) -> str:
    windows = sorted({one.context for one in measured.bits})
    value = {(one.text, one.context): one.bits_per_byte for one in measured.bits}
    sizes = {one.text: one.n_bytes for one in measured.bits}
    rows = [[name, f"{size:,}", *(f"{value[name, w]:.3f}" for w in windows)] for name, size in sizes.items()]
    return (
        "### Bits per byte\n\nIn windows that start afresh, by the tokens of context that the last of each has.\n\n"
        + _table(["text", "bytes", *(f"{w - 1} tokens" for w in windows)], rows)
    )


def _passkey_tables(measured: Measured) -> str:
    if not measured.passkey:
        return "### Passkey\n\nNot measured: the model has too few positions for the prompts."
    full = [score for score in measured.passkey if score.spec == FULL]
    lengths, depths = sorted({s.n_tokens for s in full}), sorted({s.depth for s in full})
    at = {(s.n_tokens, s.depth): s for s in full}
    by_depth = [[f"{n}", *(f"{at[n, d].found}/{at[n, d].trials}" for d in depths)] for n in lengths]
    by_spec = [
        [name, *(_found([s for s in measured.passkey if (s.spec, s.n_tokens) == (name, n)]) for n in lengths)]
        for name in measured.specs
    ]
    return (
        "### Passkey\n\n"
        "Keys found, exactly and greedily, of those asked for. The prompt, with the paper's filler, is run and "
        "compressed; the question is asked of what is left. Full cache, by tokens of the prompt (at most) and depth of "
        "the key:\n\n"
        + _table(["tokens", *(f"depth {d:g}" for d in depths)], by_depth)
        + "\n\nAll depths together, by what the cache keeps:\n\n"
        + _table(["cache", *(f"{n} tokens" for n in lengths)], by_spec)
    )


def _found(scores: Sequence[PasskeyScore]) -> str:
    return f"{sum(s.found for s in scores)}/{sum(s.trials for s in scores)}"


def _nll_table(measured: Measured) -> str:
    if not measured.nll:
        return "### Change of NLL\n\nNot measured: the texts are too short."
    rows = [
        [change.spec, _change(change.mean), f"{_change(min(change.by_text))} to {_change(max(change.by_text))}"]
        for change in measured.nll
    ]
    return (
        f"### Change of NLL\n\nNats a token, of the {measured.nll_new_tokens} tokens after a prompt of "
        f"{measured.nll_prompt_tokens}, fed one at a time, against the full cache; over "
        f"{len(measured.nll[0].by_text)} chunks of the texts. A plan's layers were suggested by the capture of one "
        "chunk, the first, which is not among them if there are others.\n\n" + _table(["cache", "mean", "range"], rows)
    )


def _change(nats: float) -> str:
    return f"{round(nats, 3) + 0.0:+.3f}"  # + 0.0: no -0.000


def _heads_table(heads: Heads) -> str:
    rows = [
        [f"{layer}", *(_cell(g, below, heads.chunks) for g, below in zip(gammas, counts, strict=True))]
        for layer, (gammas, counts) in enumerate(zip(heads.gamma, heads.below_zero, strict=True))
    ]
    tally: dict[str, int] = {}
    for name in (name for row in heads.verdict for name in row):
        tally[name] = tally.get(name, 0) + 1
    return (
        "### Does low norm predict attention in it?\n\n"
        f"Γ, mean over {heads.chunks} chunks of {heads.chunk_tokens} tokens or a few more: −1 low-norm keys get all "
        f"the attention, as the paper has it, 0 chance, +1 high-norm keys do. It is below 0 in {heads.mean_below_zero} "
        f"of {heads.total} heads, and has the same sign in every chunk in {heads.steady}. In brackets, the chunks in "
        "which it is below 0; layers down, query heads across.\n\n"
        + _table(["", *(f"head {head}" for head in range(len(heads.gamma[0])))], rows)
        + f"\n\nThe verdict that most chunks give (|Γ| of {WEAK} or more, with and without the first token), in heads: "
        + ", ".join(f"{name} {count}" for name, count in sorted(tally.items(), key=lambda item: -item[1]))
        + "."
    )


def _cell(gamma: float | None, below: int, chunks: int) -> str:
    return "undefined" if gamma is None else f"{signed(gamma)} ({below}/{chunks})"


def _samples(measured: Measured) -> str:
    blocks = [
        "\n".join(f"    {line}" for line in (sample.prompt + " |" + sample.continuation).splitlines())
        for sample in measured.samples
    ]
    return "### Samples\n\nGreedy, over the full cache; what is after the bar is the model's.\n\n" + "\n\n".join(blocks)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
