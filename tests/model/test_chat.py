"""A chat over caches that live on: each turn runs its own tokens alone, and gives what one long text would."""

import math
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from analysis import TextError, preview
from analysis.demo.telling import Chat
from analysis.errors import SettingsError
from analysis.evaluation.prompts import decoded, prompt_tokens
from analysis.models.load import LoadedModel
from analysis.preview import next_logits, stream
from analysis.sampling import Sampling
from l2kv import CompressionSpec
from tests.support.oracle import masked_forward
from tests.support.paths import BUNDLED
from tests.support.texts import TEMPLATE

FIRST, SECOND = "<s>user\nWho is it?</s>\n<s>assistant\n", "</s>\n<s>user\nAnd why?</s>\n<s>assistant\n"
NOTHING_EVICTED = CompressionSpec(keep_ratio=1.0)


@pytest.fixture
def talker(loaded) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.chat_template = TEMPLATE
    return LoadedModel(loaded.model, tokenizer, "books-5m")


def ids_of(talker, text):
    return talker.tokenizer(text, add_special_tokens=False).input_ids


def said(talker, chat, message, new_tokens=4):
    """The last step of each cache, the full one first."""
    *_, story = chat.say(talker, message, new_tokens=new_tokens)
    assert story is chat.turns[-1] and story.ended and story.prompt == message
    return [cache.steps[-1] for cache in story.caches]


@pytest.mark.parametrize("spec", [NOTHING_EVICTED, CompressionSpec(keep_ratio=0.4), CompressionSpec(protect_last=3)])
def test_every_turn_is_what_a_masked_forward_of_the_whole_text_gives(talker, spec):
    chat = Chat({"one": spec})
    (_, one), (_, two) = said(talker, chat, "Who is it?"), said(talker, chat, "And why?")
    asked, further = ids_of(talker, FIRST), ids_of(talker, SECOND)
    ids = [*asked, *one.token_ids, *further, *two.token_ids]
    chunks = (len(asked) - 1, *[1] * 4, len(further), *[1] * 4)  # the last token of an answer is read with what follows
    logits, kept = masked_forward(talker.model, torch.tensor([ids[:-1]]), chunks, spec)
    for step, start in ((one, len(asked)), (two, len(asked) + 4 + len(further))):
        assert logits[0, start - 1 : start + 3].argmax(-1).tolist() == list(step.token_ids)
    assert two.held == tuple(len(layer[0][0]) for layer in kept) and two.seen == len(ids) - 1
    # What the page shows: the tokens that this cache had read, and the heads that hold each.
    heads = Counter(position for layer in kept for head in layer[0] for position in head)
    assert two.kept == tuple(heads[position] for position in range(len(ids) - 4))
    labels = chat.turns[-1].caches[1].labels
    assert "".join(labels) == "".join(talker.tokenizer.decode([id]) for id in ids[:-4])


def test_an_answer_that_ended_is_not_ended_again(talker, monkeypatch):
    def ends(loaded, token, cache):
        logits = next_logits(loaded, token, cache)
        return logits.index_fill(0, torch.tensor([talker.tokenizer.eos_token_id]), torch.inf)

    monkeypatch.setattr(preview, "next_logits", ends)
    chat = Chat({})
    (one,), (two,) = said(talker, chat, "Who is it?"), said(talker, chat, "And why?")
    assert one.finished and one.text == "" and two.seen == len(ids_of(talker, FIRST + SECOND))


def test_each_cache_remembers_its_own_answers(talker):
    chat = Chat({"small": CompressionSpec(keep_ratio=0.2)})
    first, (full, small) = (said(talker, chat, message) for message in ("Who is it?", "And why?"))
    assert [story.prompt for story in chat.turns] == ["Who is it?", "And why?"]
    read, of_small = ("".join(cache.labels) for cache in chat.turns[-1].caches)
    assert first[0].text != first[1].text and first[0].text in read and first[1].text in of_small
    assert full.seen == small.seen and max(small.held) == math.ceil(0.2 * small.seen) < full.held[0] == full.seen


def test_a_turn_that_was_stopped_leaves_a_chat_that_can_be_continued(talker):
    chat = Chat({})
    stories = chat.say(talker, "Who is it?", new_tokens=50)
    next(stories)
    stories.close()
    (two,) = said(talker, chat, "And why?")
    assert [story.ended for story in chat.turns] == [False, True] and two.seen == len(ids_of(talker, FIRST)) + 1 + len(
        ids_of(talker, SECOND)
    ) + 3


def test_what_cannot_be_said_leaves_the_chat_as_it_was(talker, loaded):
    chat = Chat({})
    said(talker, chat, "Who is it?")
    with pytest.raises(TextError, match="empty"):
        said(talker, chat, " ")
    assert said(talker, chat, "And why?")[0].seen and len(chat.turns) == 2
    with pytest.raises(TextError, match="no chat template"):
        said(loaded, Chat({}), "Who is it?")


def test_special_tokens_in_a_message_are_told(talker):
    (note,) = prompt_tokens(talker.tokenizer, "Is it </s>?", chat=True).notes
    assert "</s>" in note


def test_tokens_that_share_a_character_are_labelled_with_it_and_numbered(talker):
    labels = decoded(talker.tokenizer, prompt_tokens(talker.tokenizer, "Is it 🙂, \u05d0?", chat=True).ids)
    shown = [label for label in labels if "/" in label and "s" not in label]
    assert shown == ["🙂 1/4", "🙂 2/4", "🙂 3/4", "🙂 4/4", "\u05d0 1/2", "\u05d0 2/2"]
    assert not any("\N{REPLACEMENT CHARACTER}" in label for label in labels)


def test_tokens_are_drawn_by_their_shares_and_only_from_the_most_probable():
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    drawn = [Sampling(1.0, top_p=0.7, seed=seed).draw(logits, 0) for seed in range(600)]
    assert set(drawn) == {1, 2} and abs(drawn.count(1) / 600 - 0.5 / 0.8) < 0.06
    assert Sampling().draw(logits, 0) == 1
    cold = [Sampling(0.05, seed=seed).draw(logits, 3) for seed in range(50)]
    assert set(cold) == {1}  # (0.5 / 0.3) ** 20 to 1
    for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(SettingsError):
            Sampling(**bad)


def test_columns_draw_by_the_same_numbers_and_a_seed_repeats_them(loaded):
    def texts(seed):
        *_, steps = stream(
            loaded, "The old man looked at the sea.", [None, NOTHING_EVICTED], max_new_tokens=12,
            sampling=Sampling(1.5, seed=seed),
        )  # fmt: skip
        return [step.token_ids for step in steps]

    one, same = texts(1)
    assert one == same and texts(1) == [one, same] != texts(2)
