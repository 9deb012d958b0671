"""The live preview: columns in step, each as if it were alone."""

from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from analysis import ModelError, TextError
from analysis.models.load import LoadedModel
from analysis.preview import stream, whole_characters
from l2kv import CompressionSpec
from tests.support.models import build
from tests.support.oracle import masked_forward
from tests.support.paths import BUNDLED
from tests.support.texts import TEMPLATE

PROMPT = "The old man looked at the sea, and the sea looked at the old man. Then he said to his wife: "


def test_the_full_column_is_plain_generate(loaded):
    steps = list(stream(loaded, PROMPT, [None], max_new_tokens=12))
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = loaded.model.generate(inputs, max_new_tokens=12, do_sample=False)[0, inputs.shape[1] :].tolist()
    assert list(steps[-1][0].token_ids) == expected
    assert [len(row[0].token_ids) for row in steps] == list(range(1, 13))
    assert steps[-1][0].text == loaded.tokenizer.decode(expected)


def test_a_question_is_put_through_the_template_and_its_end_token_ends_the_answer_unseen(loaded):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.chat_template = TEMPLATE
    asked = LoadedModel(loaded.model, tokenizer, "books-5m")
    steps = list(stream(asked, "Who is it?", [None], max_new_tokens=6, chat=True))
    text = "<s>user\nWho is it?</s>\n<s>assistant\n"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    expected = asked.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(steps[-1][0].token_ids) == expected
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(expected[3])  # which neither config knows
    first = expected.index(expected[3])
    ended = list(stream(asked, "Who is it?", [None], max_new_tokens=6, chat=True))[-1][0]
    assert ended.finished and list(ended.token_ids) == expected[: first + 1]
    assert ended.text == tokenizer.decode(expected[:first])


def test_special_tokens_are_not_shown(loaded, monkeypatch):
    end = torch.nn.functional.one_hot(torch.tensor(loaded.tokenizer.eos_token_id), len(loaded.tokenizer))
    monkeypatch.setattr("analysis.preview.next_logits", lambda *_: end)
    (step,) = list(stream(loaded, PROMPT, [None], max_new_tokens=3))[-1]
    assert step.finished and step.text == "" and len(step.token_ids) == 1


def test_each_column_is_what_it_would_be_alone_and_its_first_token_is_already_compressed(loaded):
    specs = [
        None,
        CompressionSpec(keep_ratio=0.3),
        CompressionSpec(keep_ratio=0.6, policy="high_norm", skip_layers=(0,)),
    ]
    last = list(stream(loaded, PROMPT, specs, max_new_tokens=8, count_heads=True))[-1]
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    n = prompt.shape[1]
    for step, spec in zip(last[1:], specs[1:], strict=True):
        ids = torch.cat([prompt, torch.tensor([step.token_ids])], dim=1)
        logits, kept = masked_forward(loaded.model, ids[:, :-1], (n - 1, *[1] * 8), spec)
        assert logits[0, n - 1 :].argmax(-1).tolist() == list(step.token_ids)
        assert step.held == tuple(len(layer[0][0]) for layer in kept)
        holders = Counter(position for layer in kept for head in layer[0] for position in head)
        assert step.kept == tuple(holders[position] for position in range(n))
        pair = 4 * 32 * 2 * 4  # kv heads, head_dim, K and V, float32
        assert step.nbytes == sum(step.held) * pair and 0 <= step.slack_nbytes <= 0.3 * step.nbytes
    assert last[0].held == (n + 7,) * 6


def test_closing_it_midway_restores_the_model(loaded):
    rows = stream(loaded, PROMPT, [None, CompressionSpec()], max_new_tokens=50)
    next(rows)
    assert loaded.model.config._attn_implementation != "sdpa"
    rows.close()
    assert loaded.model.config._attn_implementation == "sdpa"


def test_the_prompt_is_told_layer_by_layer_and_may_be_cancelled_there(loaded):
    told, specs = [], [None, CompressionSpec()]
    plain = next(stream(loaded, PROMPT, specs, max_new_tokens=3))
    rows = stream(loaded, PROMPT, specs, max_new_tokens=3, progress=lambda *layers: told.append(layers))
    assert next(rows) == plain and told == [(done, 12, "layers of 2 caches") for done in range(1, 13)]
    rows.close()

    def cancel(done, total, what):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(stream(loaded, PROMPT, specs, max_new_tokens=3, progress=cancel))
    assert loaded.model.config._attn_implementation == "sdpa"


def test_a_column_that_ends_its_text_waits_for_the_others(loaded, monkeypatch):
    free = list(stream(loaded, PROMPT, [None, CompressionSpec(keep_ratio=0.2)], max_new_tokens=8))
    end = free[-1][0].token_ids[2]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end])
    bound = list(stream(loaded, PROMPT, [None, CompressionSpec(keep_ratio=0.2)], max_new_tokens=8))
    assert bound[-1][0].finished and len(bound[-1][0].token_ids) == free[-1][0].token_ids.index(end) + 1
    assert len(bound) == 8 or bound[-1][1].finished


def test_half_a_character_is_not_shown(loaded):
    emoji = loaded.tokenizer("🙂", add_special_tokens=False).input_ids
    whole = loaded.tokenizer.decode(emoji[-4:])
    assert whole == "🙂"
    assert whole_characters("a" + loaded.tokenizer.decode(emoji[-4:-1])) == "a"


def test_bad_requests_are_refused(loaded):
    with pytest.raises(TextError, match="empty"):
        next(stream(loaded, " ", [None], max_new_tokens=3))
    with pytest.raises(ValueError, match="layer 9"):
        next(stream(loaded, PROMPT, [CompressionSpec(skip_layers=(9,))], max_new_tokens=3))
    latent = build("llama", vocab_size=4096)
    latent.config.kv_lora_rank = 4
    with pytest.raises(ModelError, match="latents"):
        next(stream(LoadedModel(latent, loaded.tokenizer, "latent"), PROMPT, [CompressionSpec()], max_new_tokens=3))
