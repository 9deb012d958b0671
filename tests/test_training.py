"""Training a small model: the corpus, the episodes, the loop that can be stopped anywhere, and the card."""

import json
import lzma
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis import ModelError, TextError, UserError, capture, load_model
from analysis.commands import main
from analysis.evaluation import bits_per_byte
from analysis.training import loop, measured
from analysis.training.card import Origin, Stated, make_card
from analysis.training.corpus import Corpus, documents, text_files, train_tokenizer
from analysis.training.episodes import Episodes
from analysis.training.loop import train
from analysis.training.measured import Effort
from analysis.training.recipe import SHAPES, Recipe

WORDS = (
    "the",
    "old",
    "man",
    "sea",
    "looked",
    "said",
    "was",
    "cold",
    "dark",
    "boat",
    "with",
    "and",
    "of",
    "his",
    "hand",
    "her",
    "wind",
    "rose",
    "fell",
    "over",
    "under",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose more to the handing out of work than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prose(n_words, seed):
    rng = np.random.default_rng(seed)
    return " ".join(
        word + ("." if i % 9 == 8 else "") for i, word in enumerate(rng.choice(WORDS, n_words))
    ).capitalize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\0".join([prose(40, 0), "  \n", prose(3000, 1), ""]), encoding="utf-8")
    (folder / "b.txt.xz").write_bytes(lzma.compress("\0".join([prose(2000, 2), "Größe 12345"]).encode()))
    (folder / "c.txt").write_text(prose(14000, 3))
    (folder / "not a text.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return train_tokenizer(folder, 300)


@pytest.fixture(scope="module")
def corpus(folder, tokenizer, tmp_path_factory):
    return Corpus(folder, tokenizer, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def expected_tokens(tokenizer):
    """All documents one after the other, each with its end: made of the texts, not of the files."""
    texts = [prose(40, 0), prose(3000, 1), prose(2000, 2), "Größe 12345", prose(14000, 3)]
    return [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]


class At:
    """Stands in for a generator: draws from where the test says, and knows from among how many places."""

    def __init__(self, place):
        self.place = place

    def integers(self, places):
        self.places = places
        return self.place if self.place >= 0 else places + self.place


# ------------------------------------------------------------------------------------------------------------- corpus


def test_documents_are_separated_by_nul_and_empty_ones_are_none(folder):
    assert list(documents(folder / "a.txt")) == [prose(40, 0), prose(3000, 1)]
    assert list(documents(folder / "b.txt.xz")) == [prose(2000, 2), "Größe 12345"]
    assert [path.name for path in text_files(folder)] == ["a.txt", "b.txt.xz", "c.txt"]


def test_a_draw_is_any_stretch_of_the_files_in_a_row_also_across_them(corpus, expected_tokens):
    row = [token for document in expected_tokens for token in document]
    ends = np.cumsum([len(document) for document in expected_tokens])
    assert corpus.n_train == len(row) - len(row) // 100
    for start in (0, 7, ends[0] - 3, ends[1] - 20, ends[3] - 20, ends[1] + 5):
        assert corpus.draw(At(start), 50).tolist() == row[start : start + 50]
    long = ends[3] - ends[1] + 40  # over all of the file in the middle
    assert corpus.draw(At(ends[1] - 20), long).tolist() == row[ends[1] - 20 : ends[1] - 20 + long]


def test_what_is_held_out_is_never_drawn(corpus, expected_tokens, tokenizer):
    row = [token for document in expected_tokens for token in document]
    last = At(-1)
    assert corpus.draw(last, 30).tolist() == row[corpus.n_train - 30 : corpus.n_train]
    assert last.places == corpus.n_train - 29
    texts = corpus.held_out(3, 40)
    held_out = tokenizer.decode(row[corpus.n_train :], skip_special_tokens=True)
    assert len(texts) == 3 and all(text in held_out for text in texts)
    assert all(len(tokenizer(text, add_special_tokens=False).input_ids) >= 36 for text in texts)


def test_every_digit_is_a_token_and_every_text_comes_back(tokenizer):
    text = "Größe 12345, – and\n\n  spaces 🙂"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    pieces = [tokenizer.decode([token]) for token in tokenizer(" 48213").input_ids]
    assert pieces[-5:] == list("48213")


def test_a_file_that_has_changed_is_tokenised_again(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(prose(300, 5))
    told = []
    Corpus(tmp_path, tokenizer, tmp_path / "tokens", on_file=told.append)
    before = Corpus(tmp_path, tokenizer, tmp_path / "tokens", on_file=told.append)
    assert told == ["a.txt"]
    (tmp_path / "a.txt").write_text(prose(600, 5))
    stored = (tmp_path / "tokens" / "a.txt.tokens").stat()
    os.utime(tmp_path / "a.txt", (stored.st_atime + 5, stored.st_mtime + 5))
    after = Corpus(tmp_path, tokenizer, tmp_path / "tokens", on_file=told.append)
    assert told == ["a.txt", "a.txt"] and after.n_train > 1.8 * before.n_train


def test_bad_corpora_are_refused(tmp_path, tokenizer):
    with pytest.raises(TextError, match="no folder"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(TextError, match=r"no \.txt"):
        text_files(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match=r"a\.txt cannot be read as UTF-8"):
        Corpus(tmp_path, tokenizer, tmp_path / "tokens")
    (tmp_path / "a.txt").write_text("Too little.")
    small = Corpus(tmp_path, tokenizer, tmp_path / "tokens")
    with pytest.raises(TextError, match=r"Too little text: .* a sequence takes 50"):
        small.draw(np.random.default_rng(0), 50)
    with pytest.raises(TextError, match="held out has 0 tokens"):
        small.held_out(2, 10)
    (tmp_path / "b.txt.xz").write_bytes(b"no xz")
    with pytest.raises(TextError, match=r"b\.txt\.xz"):
        Corpus(tmp_path, tokenizer, tmp_path / "tokens")


def test_a_tokenizer_that_cannot_be_trained_with_is_refused(folder, tmp_path, tokenizer):
    class Huge:
        bos_token_id = eos_token_id = 0

        def __len__(self):
            return 70_000

    with pytest.raises(UserError, match="70,000 tokens"):
        Corpus(folder, Huge(), tmp_path)
    endless = train_tokenizer(folder, 300)
    endless.eos_token = None
    with pytest.raises(UserError, match="begins a text"):
        Corpus(folder, endless, tmp_path)


# ----------------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("n", [64, 200, 1000])
def test_sequences_of_episodes_have_the_length_asked_for(corpus, n):
    for seed in range(20):
        sequence = Episodes(corpus).sequence(np.random.default_rng(seed), n)
        assert sequence.shape == (n,) and sequence.dtype == np.int64
        assert sequence.min() >= 0 and sequence.max() < len(corpus.tokenizer)
    again = [Episodes(corpus).sequence(np.random.default_rng(3), n) for _ in range(2)]
    assert (again[0] == again[1]).all()


@pytest.mark.parametrize("seed", range(8))
def test_the_answer_is_what_was_told(corpus, seed):
    rng, decode = np.random.default_rng(seed), corpus.tokenizer.decode
    episodes = Episodes(corpus)
    passkey = decode(episodes._passkey(rng, 600))
    (told,) = re.findall(r"The pass key is (\d{5})\. Remember it\. (\1) is the pass key\.", passkey)
    assert passkey.endswith(f" What is the pass key? The pass key is {told[0]}.\n")
    assert passkey.startswith("There is an important info hidden")
    needle = decode(episodes._needle(rng, 400))
    place, number = re.search(r"The number of (\w+) is (\d+)\.", needle).groups()
    assert needle.endswith(f"\nWhat is the number of {place}? The number of {place} is {number}.\n")
    copy = episodes._copy(rng, 300).tolist()
    sizes = [size for size in range(4, 151) if copy[:size] == copy[-size:]]
    assert sizes and max(sizes) >= 300 // 5


def test_passkeys_and_needles_fill_the_length_they_are_given(corpus):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        assert len(Episodes(corpus)._passkey(rng, 700)) == 700
        assert len(Episodes(corpus)._needle(rng, 300)) == 300


# ------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"length": 8}, "length must be 64"),
        ({"batch": 0}, "batch must be 1"),
        ({"learning_rate": -1.0}, "learning_rate must be from 0 to 1"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"synthetic": 1.5}, "synthetic"),
        ({"minutes": None}, "needs an end"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
        ({"steps": -3}, "steps must be more than 0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, reason):
    with pytest.raises(UserError, match=reason):
        Recipe(**changes)


def test_the_learning_rate_rises_stays_and_falls_in_a_line():
    recipe = Recipe(learning_rate=0.1, warmup=3, flat=0.6, steps=100, minutes=None)
    rates = [recipe.rate(step, recipe.progress(step, 0.0)) for step in (0, 1, 2, 3, 50, 60, 70, 80, 99, 100)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.075, 0.05, 0.0025, 0.0])


def test_a_training_ends_by_steps_or_by_time_whichever_is_first():
    both = Recipe(steps=100, minutes=2.0)
    assert both.progress(50, 12.0) == 0.5 and both.progress(10, 60.0) == 0.5
    assert both.progress(100, 0.0) == both.progress(1, 120.0) == both.progress(1, 500.0) == 1.0


# --------------------------------------------------------------------------------------------------------------- loop

RECIPE = Recipe(
    shape=SHAPES["tiny"], length=64, batch=4, minutes=None, steps=40, learning_rate=0.01, warmup=5, synthetic=0.2
)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "small"
    return train(folder, out, RECIPE, device="cpu", record_every=20, log=quiet)


def records(out):
    """What a training wrote of its heads, but for the time that it took."""
    return [r | {"seconds": None} for r in json.loads((out / "training.json").read_text())["records"]]


class StoppedError(Exception):
    pass


def stopped_at(line_start):
    def log(line):
        if line.startswith(line_start):
            raise StoppedError

    return log


@pytest.fixture
def stopped(folder, tmp_path):
    """The folder of a training that was stopped at step 20, with a checkpoint."""
    out = tmp_path / "stopped"
    with pytest.raises(StoppedError):
        train(folder, out, RECIPE, device="cpu", record_every=20, checkpoint_seconds=0, log=stopped_at("step 20:"))
    return out


def test_the_loss_falls_and_the_heads_are_written_down(trained):
    first, middle, last = records(trained)
    assert [r["step"] for r in (first, middle, last)] == [0, 20, 40]
    assert last["bits_per_byte"] < middle["bits_per_byte"] < first["bits_per_byte"]
    assert first["loss"] is None and last["loss"] < middle["loss"] < np.log(300)
    assert np.shape(last["gamma"]) == np.shape(last["sink_share"]) == (2, 2) and np.shape(last["bos_norm"]) == (2, 1)
    report = json.loads((trained / "training.json").read_text())
    assert report["tokens"] == 40 * 4 * 64 and report["start_from"] is None
    assert report["corpus"]["files"] == ["a.txt", "b.txt.xz", "c.txt"]


def test_the_result_is_a_model_like_any_other(trained):
    loaded = load_model(trained, device="cpu")
    assert loaded.config.max_position_embeddings == 64
    run = capture(loaded, prose(30, 9))
    assert run.n_layers == 2 and run.labels[0] == "<s>"
    assert not (trained / "checkpoint.safetensors").exists()
    assert (trained / "model.safetensors").stat().st_mode == (trained / "training.json").stat().st_mode


def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_been(folder, trained, stopped):
    told = []
    train(folder, stopped, RECIPE, device="cpu", record_every=20, log=told.append)
    assert any(line.startswith("going on from step") for line in told)
    assert (stopped / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert records(stopped) == records(trained)


def test_a_stopped_training_goes_on_with_its_own_options_only(folder, stopped, tmp_path):
    with pytest.raises(UserError, match="another recipe, stopped at step"):
        train(folder, stopped, Recipe(shape=SHAPES["tiny"], length=64, steps=40), device="cpu", log=quiet)
    with pytest.raises(UserError, match="another model to start from"):
        train(folder, stopped, RECIPE, start_from="books-5m", device="cpu", log=quiet)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "d.txt").write_text(prose(100, 8))
    with pytest.raises(UserError, match="another corpus"):
        train(other, stopped, RECIPE, device="cpu", log=quiet)


def test_a_damaged_checkpoint_is_named(folder, stopped):
    checkpoint = stopped / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors cannot be read"):
        train(folder, stopped, RECIPE, device="cpu", log=quiet)
    (stopped / "config.json").unlink()
    with pytest.raises(UserError, match="no config or tokenizer"):
        train(folder, stopped, RECIPE, device="cpu", log=quiet)


def test_a_folder_that_holds_something_else_is_left_alone(folder, trained, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    with pytest.raises(UserError, match="finished training"):
        train(folder, trained, RECIPE, device="cpu", log=quiet)
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    (model / "training.json").unlink()
    with pytest.raises(UserError, match="holds a model already"):
        train(folder, model, RECIPE, device="cpu", log=quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        train(folder, tmp_path / "file", RECIPE, device="cpu", log=quiet)


def test_tokens_of_another_vocabulary_are_not_taken_up(folder, tmp_path):
    def begin(shape):
        recipe = Recipe(shape=shape, length=64, batch=1, minutes=None, steps=1)
        with pytest.raises(StoppedError):  # before there is a checkpoint
            train(folder, tmp_path / "out", recipe, device="cpu", log=stopped_at("step 0:"))
        return (tmp_path / "out" / "tokens" / "a.txt.tokens").stat().st_size

    tiny = SHAPES["tiny"]
    small = begin(tiny)
    assert begin(replace(tiny, vocab_size=270)) > small


def test_a_training_may_start_from_a_model(folder, trained, tmp_path):
    recipe = Recipe(length=128, batch=1, minutes=None, steps=1, learning_rate=0.0)
    out = train(folder, tmp_path / "on", recipe, start_from=str(trained), device="cpu", witness_texts=1, log=quiet)
    before, after = load_model(trained, device="cpu"), load_model(out, device="cpu")
    assert after.config.max_position_embeddings == 128 and after.config.num_hidden_layers == 2
    assert all((a == b).all() for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    with pytest.raises(ModelError, match="No such model"):
        train(folder, tmp_path / "no", recipe, start_from="no such model", device="cpu", log=quiet)


def test_bad_options_are_refused_before_anything_is_written(folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no device 'toaster'"):
        train(folder, out, RECIPE, device="toaster", log=quiet)
    with pytest.raises(UserError, match="record_every must be 1"):
        train(folder, out, RECIPE, device="cpu", record_every=0, log=quiet)
    with pytest.raises(TextError, match="no folder"):
        train(tmp_path / "nowhere", out, RECIPE, device="cpu", log=quiet)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------- command line


def test_the_train_command_trains(folder, tmp_path, capfd):
    out = tmp_path / "out"
    options = ["--shape", "tiny", "--steps", "2", "--length", "64", "--batch", "1", "--device", "cpu"]
    assert main(["train", str(folder), "-o", str(out), *options]) == 0
    told = capfd.readouterr()
    assert f"wrote {out}" in told.out and "step 2:" in told.out and told.err == ""
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options,reason",
    [
        (["--shape", "huge"], "--shape must be one of tiny, 5m, 19m, got 'huge'"),
        (["--length", "3"], "length must be 64 or more"),
        (["--steps", "0"], "steps must be more than 0"),
        (["--device", "toaster"], "no device"),
        (["--record-every", "0"], "record_every"),
    ],
)
def test_a_mistake_in_the_train_command_is_one_line(folder, tmp_path, capsys, options, reason):
    assert main(["train", str(folder), "-o", str(tmp_path / "out"), "--shape", "tiny", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_train_command_that_is_interrupted_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_step", interrupted)
    assert main(["train", str(folder), "-o", str(tmp_path / "out"), "--shape", "tiny", "--length", "64"]) == 130
    assert "The same command goes on from the last checkpoint" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- card

EFFORT = Effort(
    windows=(32,),
    lengths=(),
    chunks=4,
    chunk_tokens=40,
    nll_texts=2,
    prompt_tokens=24,
    new_tokens=8,
    keep_ratios=(0.5,),
    protect_last=(0,),
    sample_tokens=4,
)


@pytest.fixture
def model(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "small")
    return copy


def test_a_card_says_what_was_measured_and_what_was_stated(model):
    texts = {"first": prose(400, 20), "second": prose(300, 21)}
    stated = Stated(data="Words drawn at random.", notes=("Two arms were tried.",))
    card = make_card(model, texts, stated, device="cpu", effort=EFFORT).read_text()
    figures = json.loads((model / "card.json").read_text())
    loaded = load_model(model, device="cpu")
    for name, text in texts.items():
        for window in (32, 64):
            value = bits_per_byte(loaded, text, context=window)
            assert f"{value:.3f}" in next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
            (one,) = [b for b in figures["bits"] if (b["text"], b["context"]) == (name, window)]
            assert one["bits_per_byte"] == pytest.approx(value, abs=1e-4)
    assert "from scratch: 40 steps, 10,240 tokens" in card and "seed 0" in card
    assert "20%, drawn at random, are synthetic" in card
    assert "Data: Words drawn at random. In 3 files" in card and "Licence: not stated." in card
    assert card.rstrip().endswith("## Note\n\nTwo arms were tried.")
    assert "Passkey\n\nNot measured" in card  # no prompt fits 64 positions
    assert len(re.findall(r"[+\N{MINUS SIGN}]0\.\d\d \([0-4]/4\)", card)) == 4  # heads


def test_the_heads_of_a_card_are_means_over_chunks(model):
    from analysis import correlation
    from analysis.tokens import passages

    text = prose(600, 22)
    loaded = load_model(model, device="cpu")
    heads = measured.measure(loaded, {"text": text}, effort=EFFORT).heads
    found = [p.prompt for p in passages(loaded.tokenizer, text, at_least=40, at_most=63)]
    chosen = [found[i * len(found) // 4] for i in range(4)]
    gammas = [correlation(capture(loaded, chunk)) for chunk in chosen]
    for layer in range(2):
        for head in range(2):
            values = [float(g[layer, head]) for g in gammas]
            assert heads.gamma[layer][head] == pytest.approx(sum(values) / 4, abs=1e-3)
            assert heads.below_zero[layer][head] == sum(v < 0 for v in values)
    assert heads.chunks == 4 and heads.total == 4
    assert heads.mean_below_zero == sum(x < 0 for row in heads.gamma for x in row)


def test_a_model_that_started_from_another_says_so(model, tmp_path):
    report = json.loads((model / "training.json").read_text())
    report["start_from"] = "/somewhere/private/books-5m"
    del report["corpus"]
    (model / "training.json").write_text(json.dumps(report))
    card = make_card(model, {"text": prose(300, 23)}, Stated(), device="cpu", effort=EFFORT).read_text()
    assert "Started from the weights of `books-5m`, whose own training is not counted" in card
    assert "private" not in card and "Data: not stated." in card and "from scratch" not in card


def test_a_folder_without_the_record_of_a_training_gets_no_card(model, tmp_path):
    with pytest.raises(UserError, match="holds no training"):
        Origin.read(tmp_path)
    (model / "training.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as the record"):
        Origin.read(model)
    (model / "training.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read as the record"):
        make_card(model, {"text": prose(300, 23)}, Stated(), device="cpu", effort=EFFORT)


def test_texts_too_short_for_a_card_are_refused(model):
    with pytest.raises(TextError, match="Give longer ones"):
        make_card(model, {"short": "A word. Another."}, Stated(), device="cpu", effort=EFFORT)
    assert not (model / "README.md").exists()


def test_the_card_command_writes_a_card(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measured, "Effort", lambda: EFFORT)
    (tmp_path / "some text.txt").write_text(prose(300, 24))
    (tmp_path / "note.md").write_text("From a file.")
    options = ["--texts", str(tmp_path / "some text.txt"), "--device", "cpu", "--licence", "MIT"]
    assert main(["card", str(model), *options, "--note", str(tmp_path / "note.md"), "--note", "x" * 5000]) == 0
    assert capsys.readouterr().out == f"wrote {model / 'README.md'}\n"
    card = (model / "README.md").read_text()
    assert "| some text |" in card and "Licence: MIT." in card and "From a file." in card and "x" * 5000 in card
    assert main(["card", str(tmp_path / "nowhere")]) == 2
    assert "holds no training.json" in capsys.readouterr().err
