"""The command line, as a user types it."""

import pytest

from analysis.commands import main
from analysis.run import load_run

TEXT = "The old man looked at the sea, and the sea looked at the old man, and neither of them said a word."


def test_a_text_file_becomes_a_run_that_can_be_read_and_told(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "run.safetensors"
    text.write_text(TEXT)
    assert main(["capture", str(text), "--out", str(out), "--device", "cpu"]) == 0
    assert "6 layers" in capsys.readouterr().out
    assert load_run(out).text == TEXT
    assert main(["heads", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 3 + 48 + 1 and "Does low norm predict attention in books-5m?" in told


@pytest.mark.parametrize(
    "text,model,reason",
    [
        ("", "books-5m", "empty"),
        (None, "books-5m", "cannot be read"),
        (b"\xff\xfe\x00", "books-5m", "UTF-8"),
        (TEXT, "no such model", "No such model"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(tmp_path, capsys, text, model, reason):
    file, out = tmp_path / "text.txt", tmp_path / "run.safetensors"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["capture", str(file), "--out", str(out), "--model", model]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not out.exists()


def test_a_file_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    assert main(["heads", str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors is not a run" in capsys.readouterr().err


def test_the_demo_run_is_the_one_that_the_command_makes(tmp_path):
    from analysis.presets import bundled_results, bundled_texts, make_demo

    shipped, fresh = (
        load_run(bundled_results("books-5m").demo),
        load_run(make_demo("books-5m", tmp_path / "demo.safetensors")),
    )
    assert shipped.text == next(iter(bundled_texts().values())) and shipped.labels == fresh.labels
    assert abs(shipped.key_norm - fresh.key_norm).max() < 1e-3
    assert abs(shipped.probe_attention - fresh.probe_attention).max() < 1e-4
