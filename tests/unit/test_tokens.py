"""Which characters each token covers, on texts that were written to break that."""

import threading
import time
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from analysis.errors import ModelError, TextError
from analysis.texts import tokens as module
from analysis.texts.tokens import about_tokens, check_text, check_tokenizer, notes_of, tokenize
from tests.support.paths import BUNDLED, STORIES

FAMILY = "👩\u200d👩\u200d👧"
TEXTS = {
    "plain": "The cat sat on 12 mats.",
    "one token": "a",
    "one character many times": "a" * 300,
    "emoji": f"🙂🙂 a🙂b {FAMILY} 🇩🇪",
    "right to left": "שלום עולם, مرحبا",
    "no spaces between words": "日本語のテキスト",
    "combining": "e\u0301 a\u0300\u0301 Z\u0351\u036b\u0343",
    "NUL": "a\0b\0\0",
    "bidi override": "a\u202eb\u2066c\u202c",
    "noncharacters": "\ufeff x \ufffe \uffff \U0010ffff",
    "HTML": '<b onclick="x">&amp;</b><script>alert(1)</script>',
    "LaTeX": r"$\frac{a}{b}$ \\ \(x\)",
    "markdown": "[a](javascript:b) ![c](d) `e` # f",
    "control": "\t\r\n\x1b[31m\x07 x",
    "spaces around": "  lead  trail  ",
    "names of special tokens": "a <s> b</s><unk> c",
}


@pytest.fixture(scope="module", params=["books-5m", "stories260K"])
def tokenizer(request):
    folder = BUNDLED if request.param == "books-5m" else STORIES
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not on this machine")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_consecutive_spans_cover_the_text_without_a_gap_and_overlap_only_within_a_character(tokenizer, text):
    spans = tokenize(tokenizer, text).spans
    covering = spans[spans[:, 1] > spans[:, 0]]
    assert covering[0, 0] == 0
    assert covering[-1, 1] == len(text)
    for before, after in pairwise(covering):
        assert after[0] == before[1] or (after == before).all()
        assert (after != before).any() or after[1] - after[0] == 1


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_label_is_the_characters_of_its_span_and_numbers_the_tokens_of_one_character(tokenizer, text):
    tokens = tokenize(tokenizer, text)
    pieces = [text[start:end] for start, end in tokens.spans]
    starts = [start for start, end in tokens.spans if end > start]
    for label, piece, (start, end) in zip(tokens.labels, pieces, tokens.spans, strict=True):
        if start == end:
            assert label in ("<s>", "▁")
        elif starts.count(start) == 1:
            assert label == piece
        else:
            assert label.startswith(f"{piece} ")
            assert label.endswith(f"/{starts.count(start)}")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_ids_are_those_that_the_tokenizer_gives_the_model(tokenizer, text):
    tokens = tokenize(tokenizer, text)
    assert tokens.ids.tolist() == tokenizer(text)["input_ids"]
    assert len(tokens) == len(tokens.ids) == len(tokens.spans) == len(tokens.labels)
    assert (tokens.ids.dtype, tokens.spans.dtype) == (np.int64, np.int32)


def test_an_emoji_is_the_label_of_each_of_its_tokens_numbered_afresh_for_its_neighbour(tokenizer):
    labels = tokenize(tokenizer, "a🙂🙂").labels
    assert labels == ("<s>", "a", *(f"🙂 {i}/4" for i in (1, 2, 3, 4)), *(f"🙂 {i}/4" for i in (1, 2, 3, 4)))


def test_a_space_that_the_tokenizer_put_before_the_text_covers_no_character():
    if not STORIES.is_dir():
        pytest.skip("stories260K is not on this machine")
    tokens = tokenize(AutoTokenizer.from_pretrained(STORIES), "<b")
    assert tokens.labels == ("<s>", "▁", "<", "b")
    assert tokens.spans.tolist() == [[0, 0], [0, 0], [0, 1], [1, 2]]


def bytes_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token per byte, and those merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_token_of_a_space_and_the_first_byte_of_an_emoji_counts_as_one_of_its_tokens():
    # as in GPT-2, Llama 3 and Qwen: " 🙂" is b" \xf0", b"\x9f", b"\x99", b"\x82", and "Ġ", "ð" stand for the first two
    tokens = tokenize(bytes_tokenizer(("Ġ", "ð")), "a 🙂b")
    assert tokens.spans.tolist() == [[0, 1], [1, 3], [2, 3], [2, 3], [2, 3], [3, 4]]
    assert tokens.labels == ("a", " 🙂 1/4", "🙂 2/4", "🙂 3/4", "🙂 4/4", "b")


def test_a_tokenizer_without_offsets_labels_with_its_own_pieces():
    class Slow:
        is_fast = False

        def __call__(self, text, *, add_special_tokens=True, verbose):
            return {"input_ids": [1, 0, 2] if add_special_tokens else [0, 2]}

        def convert_ids_to_tokens(self, ids):
            return [("▁a", "<s>", "b")[i] for i in ids]

    tokens = tokenize(Slow(), "ab")
    assert tokens.labels == ("<s>", "▁a", "b")
    assert tokens.spans.tolist() == [[0, 0]] * 3


def test_a_hundred_thousand_newlines_take_seconds_not_minutes(tokenizer):
    started = time.perf_counter()
    tokens = tokenize(tokenizer, "\n" * 100_000 + "a")
    assert time.perf_counter() - started < 10
    assert tokens.spans[-1].tolist() == [100_000, 100_001]
    assert (np.diff(tokens.spans[-100_000:], axis=0) == 1).all()


# Special tokens


def with_template(single: str) -> PreTrainedTokenizerFast:
    """books-5m's tokenizer, which puts around a text what `single` says."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    specials = [(name, i) for i, name in enumerate(("<s>", "</s>")) if name in single]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return tokenizer


@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> </s> $A", "<s> <s> $A </s> </s>"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_a_tokenizer_puts_before_a_text_stays_and_what_it_puts_after_it_is_left_out(single, text):
    tokenizer, before = with_template(single), single.split("$A")[0].split()
    tokens, bare = tokenize(tokenizer, text), tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.ids.tolist() == tokenizer.convert_tokens_to_ids(before) + bare
    assert tokens.labels[: len(before)] == tuple(before) and not tokens.spans[: len(before)].any()
    assert len(tokens.spans) == len(tokens.labels) == len(tokens)
    if single.endswith("$A"):
        assert tokens.notes == ()
    else:
        (note,) = tokens.notes
        assert note.startswith("The tokenizer's end token, </s>") and "is left out" in note


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "<s> </s> $A"])
def test_a_text_that_begins_with_the_start_token_gets_no_other(single):
    tokenizer = with_template(single)
    start = "".join(single.split("$A")[0].split())
    tokens, own = tokenize(tokenizer, start + "The sea."), tokenize(tokenizer, "The sea.")
    assert tokens.ids.tolist() == own.ids.tolist()
    assert any("begins with the start token" in note for note in tokens.notes)
    assert tokens.spans[-1].tolist() == [len(start) + 7, len(start) + 8]
    assert not any("begins with" in note for note in tokenize(tokenizer, f"The {start}sea.").notes)


@pytest.mark.parametrize("text", ["Der Bär", "a", "déjà 🙂"])
def test_a_tokenizer_without_offsets_leaves_its_end_token_out_too(text):
    tokens = tokenize(ByT5Tokenizer(), text)
    assert len(tokens) == len(text.encode()) == len(tokens.labels) and "</s>, is left out" in tokens.notes[0]


def test_notes_of_many_texts_are_told_once():
    tokenizer = with_template("<s> $A </s>")
    assert len(notes_of(tokenizer, ["One.", "Two.", "<s>Three.", "<s>Four."])) == 2
    assert notes_of(AutoTokenizer.from_pretrained(BUNDLED), ["One.", "Two."]) == ()


# Normalisers

NORMALISERS = {
    "NFC": normalizers.NFC(), "NFD": normalizers.NFD(), "NFKC": normalizers.NFKC(), "NFKD": normalizers.NFKD(),
    "accents stripped": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "lower case": normalizers.Lowercase(), "BERT": normalizers.BertNormalizer(),
    "marks dropped": normalizers.Replace("\u0301", ""),
}  # fmt: skip
WRITTEN = {
    "composed": "Déjà vu, ça va? Ångström ở đây",
    "by two characters": unicodedata.normalize("NFD", "Déjà vu, ça va? Ångström ở đây"),
    "first and last": "e\u0301 a\u0300",
    "several on one": "Z\u0351\u036b\u0343a\u0316\u0301b",
    "Hangul by its letters": unicodedata.normalize("NFD", "한국어 텍스트"),
    "ligatures": "ﬁn ½ ① ａｂ",
    "emoji": f"a🙂e\u0301🙂 {FAMILY}",
    "control": "a\x07b \x07 c",
}


@pytest.mark.parametrize("normaliser", NORMALISERS.values(), ids=NORMALISERS)
@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("words", [False, True], ids=["bytes", "words"])
def test_spans_of_a_tokenizer_that_normalises_cover_all_that_they_stand_for(normaliser, text, words):
    tokenizer = word_tokenizer(text, normaliser) if words else bytes_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normaliser
    tokens = tokenize(tokenizer, text)
    covered = {i for start, end in tokens.spans.tolist() for i in range(start, end)}
    assert covered >= {i for i, character in enumerate(text) if not character.isspace()}
    starts, ends = tokens.spans.T
    assert (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all()
    for label, (start, end) in zip(tokens.labels, tokens.spans.tolist(), strict=True):
        assert label.startswith(text[start:end])
        # No accent is cut off, unless it is another token.
        assert end == len(text) or not unicodedata.combining(text[end]) or end in starts


def word_tokenizer(text: str, normaliser) -> PreTrainedTokenizerFast:
    """A token a word, white space dropped, as BERT's."""
    split = pre_tokenizers.WhitespaceSplit()
    words = {word for word, _ in split.pre_tokenize_str(normaliser.normalize_str(text))}
    vocabulary = {word: i for i, word in enumerate(["?", *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=made)


# What is refused


@pytest.mark.parametrize("text", ["", " ", "\n\n\t ", "\u3000\u2003", "\r\n" * 1000])
def test_a_text_of_nothing_but_white_space_is_called_empty(tokenizer, text):
    with pytest.raises(TextError, match="empty"):
        tokenize(tokenizer, text)


@pytest.mark.parametrize(("text", "at"), [("\ud83d", 0), ("ab\udc00", 2), ("🙂\udfff ", 1)])
def test_half_a_character_is_refused_with_its_place(tokenizer, text, at):
    with pytest.raises(TextError, match=f"U\\+{ord(text[at]):04X}.*position {at}\\.") as refused:
        tokenize(tokenizer, text)
    str(refused.value).encode()  # the message can be shown


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_valid_text_passes_the_check(text):
    check_text(text)


# What takes too long, or cannot be read


def word_piece(most: int) -> PreTrainedTokenizerFast:
    """Of words of up to so many characters: the time that it takes for one grows with the square of its length."""
    made = Tokenizer(models.WordPiece(vocab={"?": 0, "a": 1, "##a": 2}, unk_token="?", max_input_chars_per_word=most))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", ["a" * 100_000, "It is. " * 5000 + "a" * 400_000 + " And so on." * 5000])
def test_a_word_that_would_take_too_long_is_refused_before_it_is_begun(text):
    started, threads = time.perf_counter(), set(threading.enumerate())
    with pytest.raises(
        TextError, match=r"a word of \d00,000 characters, 'a+' and so on.* about [\d,]+ seconds. Shorten it"
    ):
        tokenize(word_piece(10**6), text)
    assert time.perf_counter() - started < 10
    for thread in set(threading.enumerate()) - threads:
        thread.join(2)
        assert not thread.is_alive()  # none is left at work
    assert len(tokenize(word_piece(10**6), "aa " * 100)) == 200


def test_a_text_that_is_not_done_in_time_is_not_waited_for(monkeypatch):
    class Slow:
        is_fast = False

        def __call__(self, text, **_):
            time.sleep(1)

    monkeypatch.setattr(module, "MOST_SECONDS", 0.1)
    with pytest.raises(TextError, match=r"has not finished these 80,000 characters in 0\.1 seconds\. Shorten"):
        tokenize(Slow(), "The sea." * 10_000)


@pytest.mark.parametrize(
    "text", ["The sea.", "The sea. " * 10_000, "sea" * 30_000], ids=["short", "long", "a long word"]
)
@pytest.mark.parametrize(
    "error", [RuntimeError("no [UNK] in the vocabulary"), KeyError("x"), KeyboardInterrupt()], ids=repr
)
def test_what_a_tokenizer_raises_is_told_whether_the_text_is_short_or_long(error, text):
    class Broken:
        is_fast = False

        def __call__(self, text, **_):
            raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TextError) as raised:
        tokenize(Broken(), text)
    if not isinstance(error, KeyboardInterrupt):
        assert "The tokenizer cannot read this text (no " in str(raised.value)


@pytest.mark.parametrize(
    "made", [models.WordLevel(vocab={"b": 0}), models.Unigram([("b", -1.0)]), models.BPE()], ids=repr
)
def test_a_tokenizer_that_knows_no_word_is_refused_with_its_name(made):
    with pytest.raises(ModelError, match=r"^my model: .*tokenizer (cannot read|has no vocabulary)"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made)), "my model")


@pytest.mark.parametrize("text", ["word " * 20_000, "a" * 100_000, "🙂" * 30_000, "Plain. " * 30_000 + "🙂" * 30_000])
def test_tokens_are_estimated_at_once_and_within_a_tenth(tokenizer, text):
    started = time.perf_counter()
    about = about_tokens(tokenizer, text)
    assert time.perf_counter() - started < 0.5
    assert about == pytest.approx(len(tokenize(tokenizer, text)), rel=0.1)
    assert about_tokens(tokenizer, text[:999]) == len(tokenize(tokenizer, text[:999]))
