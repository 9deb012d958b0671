"""The tokenizers of GGUF files: the original's, or refused with the reason."""

import json

import jinja2
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoTokenizer

from analysis.models.load import load_model, tokenizer_and_config
from tests.support.gguf_files import TOKENS, write_gguf
from tests.support.gguf_models import CONFIGS, logits, random_model, refusal
from tests.support.paths import BUNDLED


def test_the_bundled_models_tokenizer_survives(tmp_path, models):
    content = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    told = {
        "pre": "smollm",  # digits apart, as there
        "tokens": vocabulary,
        "merges": [" ".join(pair) for pair in content["merges"]],
        "token_type": [3, 3] + [1] * (len(vocabulary) - 2),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unknown_token_id": None,
        "add_bos_token": True,
    }
    path = write_gguf(tmp_path / "books.gguf", models("books-5m"), GGMLQuantizationType.BF16, tokenizer=told)
    loaded, original = load_model(path, device="cpu"), AutoTokenizer.from_pretrained(BUNDLED)
    for text in ("It was the best of times in 1859.", "x", "  two\n\n\tlines — naïve 日本 <s> 12,345.6", ""):
        assert loaded.tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == original.decode(
            original(text)["input_ids"]
        )
    assert torch.equal(logits(loaded.model), logits(models("books-5m")))
    assert loaded.stored == "bfloat16"


def test_a_sentencepiece_vocabulary_of_scores_is_rebuilt(tmp_path):
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "n"]
    told = {
        "model": "llama", "pre": "default", "merges": None,
        "tokens": ["<unk>", "<s>", "</s>", *pieces],
        "scores": [0.0] * 3 + [-float(x) for x in (9, 9, 9, 9, 1, 2, 3, 9)],
        "token_type": [2, 3, 3] + [1] * len(pieces),
    }  # fmt: skip
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    tokenizer, config = tokenizer_and_config(path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("then")["input_ids"]) == ["<s>", "▁the", "n"]
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize("pre", ["no-such-rule", "default", None])
def test_a_rule_of_splitting_that_is_not_known_is_refused(tmp_path, pre):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer={"pre": pre})
    message = refusal(path)
    assert repr(pre) in message and "tokenizer.ggml.pre" in message


@pytest.mark.parametrize("kind", [3, 4], ids=["control", "user-defined"])
def test_special_tokens_outside_the_alphabet_of_bytes_keep_their_places(tmp_path, kind):
    """DeepSeek's: transformers' own way adds them anew, behind the vocabulary."""
    told = {
        "tokens": [*TOKENS[:1], "<｜begin▁of｜>", *TOKENS[2:]],
        "token_type": [3, kind, 3, *[1] * (len(TOKENS) - 3)],
    }
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    tokenizer, _ = tokenizer_and_config(path)
    assert len(tokenizer) == len(TOKENS) and tokenizer.bos_token_id == 1
    assert tokenizer("the<｜begin▁of｜>the")["input_ids"] == [TOKENS.index("the"), 1, TOKENS.index("the")]


def test_special_tokens_that_are_no_tokens_are_refused(tmp_path):
    told = {"tokens": [*TOKENS[:1], "日<s>", *TOKENS[2:]], "token_type": [1] * len(TOKENS)}
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    assert "its special tokens are not in its vocabulary" in refusal(path)


def test_a_chat_template_is_data_and_runs_in_a_sandbox(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    model = random_model(CONFIGS["llama"])
    path = write_gguf(tmp_path / "x.gguf", model, metadata={"tokenizer.chat_template": template})
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = load_model(path, device="cpu").tokenizer
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]hi"
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    path = write_gguf(tmp_path / "x.gguf", model, metadata={"tokenizer.chat_template": evil})
    tokenizer = load_model(path, device="cpu").tokenizer  # loading runs nothing
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "told",
    [
        {"merges": ["t h", "no pair"]},
        {"merges": ["th"]},
        {"tokens": ["<unk>", "<s>", "</s>", "t", "h"], "merges": ["t h"], "token_type": [1] * 5},  # Rust panics
    ],
    ids=str,
)
def test_a_tokenizer_that_transformers_cannot_build_is_refused_as_that(tmp_path, told):
    path = write_gguf(tmp_path / "x.gguf", random_model(CONFIGS["llama"]), tokenizer=told)
    assert "x: its tokenizer cannot be used" in refusal(path)
