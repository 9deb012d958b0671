"""Which characters each token covers, on texts that were written to break that."""

import time
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from analysis.errors import TextError
from analysis.tokens import check_text, tokenize
from tests.conftest import BUNDLED, STORIES

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
