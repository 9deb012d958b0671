"""Special tokens around a text: the same in captures, continuations and commands, and the user is told."""

import shutil

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from analysis import capture
from analysis.__main__ import main
from analysis.models.load import LoadedModel, load_model
from analysis.preview import stream
from tests.support.evaluation import continuation_nll
from tests.support.paths import BUNDLED

TEXT = "The old man looked at the sea, and the sea looked at the old man. He had nothing to say to it, and so he"
END, START = "</s>, is left out", "begins with the start token, <s>, already"


@pytest.fixture(scope="module")
def closing(tmp_path_factory) -> LoadedModel:
    """books-5m, with a tokenizer that closes every text with its end token."""
    folder = tmp_path_factory.mktemp("closes") / "closes"
    shutil.copytree(BUNDLED, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(folder)
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def usual() -> LoadedModel:
    return load_model("books-5m", device="cpu")


def test_heads_are_measured_on_the_same_tokens_and_it_is_told_what_was_left_out(usual, closing):
    plain = capture(usual, TEXT)
    assert plain.warnings == () and plain.labels[:2] == ("<s>", "The")
    for loaded, text, note in ((closing, TEXT, END), (usual, f"<s>{TEXT}", START)):
        run = capture(loaded, text)
        assert (run.token_ids == plain.token_ids).all() and (run.probe_attention == plain.probe_attention).all()
        assert note in run.warnings[0]


def test_a_text_goes_on_over_a_tokenizer_that_closes_texts(usual, closing):
    def said(loaded, text):
        return list(stream(loaded, text, [None], max_new_tokens=8))[-1][0].text

    assert said(closing, TEXT) == said(usual, TEXT) == said(usual, f"<s>{TEXT}")
    lengths = {"prompt_tokens": 16, "new_tokens": 8}
    nll = continuation_nll(usual, TEXT, None, **lengths)
    assert (
        continuation_nll(closing, TEXT, None, **lengths)
        == nll
        == continuation_nll(usual, f"<s>{TEXT}", None, **lengths)
    )


@pytest.mark.parametrize(
    "command",
    [
        ["capture", "FILE", "-o", "run.safetensors"],
        ["generate", "FILE", "--new-tokens", "1"],
        ["study", "FILE", "-o", "study.safetensors", "--tokens", "16", "--excerpts", "1"],
        ["plan", "FILE", "--excerpts", "1", "--prompt-tokens", "20", "--protect-last", "4"],
    ],
    ids=lambda command: command[0],
)
def test_the_command_line_tells_it(closing, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(f"<s>{TEXT}")
    arguments = [word.replace("FILE", "text.txt") for word in command]
    assert main([*arguments, "--model", closing.model.name_or_path, "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert END in told and START in told
