"""Questions to a model, and what counts as a right answer."""

import pytest
from transformers import AutoTokenizer

from analysis import TextError
from analysis.evaluation.prompts import can_chat, chat_text, decided, found, prompt_tokens
from tests.support.paths import BUNDLED
from tests.support.texts import TEMPLATE


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("48213", " 48213. Remember it.", True),
        ("48213", "The pass key is 48213.", True),
        ("48213", "482139", True),  # the digits begin with the key
        ("48213", "4821", False),
        ("48213", "44444 and then 48213", False),  # the first digits count
        ("48213", "", False),
        ("48213", "none", False),
        ("Paris", "The capital is PARIS.", True),
        (" Paris ", "paris", True),
        ("Paris", "Pari", False),
        ("1 km", "It is 1 km.", True),
    ],
)
def test_an_answer_is_found_by_the_stated_rule(answer, text, right):
    assert found(answer, text) is right


def test_a_task_without_an_answer_is_refused():
    for answer in ("", " "):
        with pytest.raises(ValueError, match="expected"):
            found(answer, "text")


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("", False),
        (" The key is", False),
        (" 482", False),  # may go on to the key
        (" 482 ", True),  # the digits have ended
        (" 482.", True),
        (" 483", True),
        (" 48213", True),
    ],
)
def test_a_key_is_decided_once_its_digits_are(text, settled):
    assert decided("48213", text) is settled


def test_what_is_decided_stays_as_it_is_however_the_text_goes_on():
    goes_on = ["", "0", "48213", " 48213", ".", " and Paris", "213"]
    for answer in ("48213", "Paris"):
        for text in ("", "4", "482", "482 ", "48213", "5", "a 48", "Par", "Paris", "x"):
            if decided(answer, text):
                assert {found(answer, text + more) for more in goes_on} == {found(answer, text)}
    assert not decided("Paris", "It is Lyon.")  # it may yet be said


def test_a_question_goes_through_the_models_own_template():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert not can_chat(tokenizer)
    with pytest.raises(TextError, match="no chat template"):
        chat_text(tokenizer, "Why?")
    tokenizer.chat_template = TEMPLATE
    assert can_chat(tokenizer)
    assert chat_text(tokenizer, "Why?") == "<s>user\nWhy?</s>\n<s>assistant\n"
    ids = prompt_tokens(tokenizer, "Why?", chat=True).ids.tolist()
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]  # fmt: skip
    assert ids.count(tokenizer.bos_token_id) == 2  # none besides those that the template writes
    assert prompt_tokens(tokenizer, "Why?").ids.tolist() == tokenizer("Why?").input_ids
    for wrong in (" ", "\ud800"):
        with pytest.raises(TextError):
            prompt_tokens(tokenizer, wrong, chat=True)
    tokenizer.chat_template = "{{ raise_exception('no user may speak') }}"
    with pytest.raises(TextError, match="no user may speak"):
        chat_text(tokenizer, "Why?")
