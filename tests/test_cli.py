"""The command line, as a user types it."""

import io
import os
import subprocess
import sys

import pytest

from analysis.captures import load_run
from analysis.cli import _parser, main
from analysis.cli.shared import any_encoding
from tests.support.paths import ROOT

TEXT = "The old man looked at the sea, and the sea looked at the old man, and neither of them said a word."


def test_a_text_file_becomes_a_run_that_can_be_read_and_told(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "run.safetensors"
    text.write_text(TEXT)
    assert main(["capture", str(text), "--out", str(out), "--model", "books-5m", "--device", "cpu"]) == 0
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


def test_the_demo_run_is_what_a_capture_of_its_text_gives():
    from analysis import capture, load_model
    from analysis.demo.presets import bundled_results

    shipped = load_run(bundled_results("books-5m").demo)
    fresh = capture(load_model("books-5m", device="cpu"), shipped.text)
    assert shipped.labels == fresh.labels
    assert abs(shipped.key_norm - fresh.key_norm).max() < 1e-3
    assert abs(shipped.probe_attention - fresh.probe_attention).max() < 1e-4


# Any encoding of standard output

ENCODINGS = ["utf-8", "cp1252", "ascii", "latin-1", "cp437", "cp932", "koi8-r"]


def printed(encoding: str, arguments: list[str]) -> tuple[int, str]:
    """What a command prints where standard output and error are of an encoding, and its exit status."""
    with pytest.MonkeyPatch.context() as patched:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        patched.setattr(sys, "stdout", streams[0])
        patched.setattr(sys, "stderr", streams[1])
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        for stream in streams:
            stream.flush()
        return status, "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run of a text that no small encoding has, in a file whose name has no characters at all."""
    folder = tmp_path_factory.mktemp("runs")
    out = folder / os.fsdecode(b"run\xff.safetensors")
    (folder / "text.txt").write_text(f"{TEXT} Γ 🙂 日本語, déjà vu.", encoding="utf-8")
    assert main(["capture", str(folder / "text.txt"), "--out", str(out), "-m", "books-5m", "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_of_every_command_is_printed_in_any_encoding(encoding):
    (commands,) = (action.choices for action in _parser()._actions if action.choices)
    for words in ([], *([name] for name in commands)):
        status, told = printed(encoding, [*words, "--help"])
        assert status == 0 and "usage: " in told


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_results_and_mistakes_are_printed_in_any_encoding(run_file, encoding):
    status, told = printed(encoding, ["heads", str(run_file)])
    assert status == 0 and "Does low norm predict attention in books-5m?" in told
    assert ("Γ" if encoding in ("utf-8", "cp437", "cp932") else "Gamma") in told
    text = str(run_file.parent / "text.txt")
    assert printed(encoding, ["generate", text, "-m", "books-5m", "--new-tokens", "2"])[0] == 0
    status, told = printed(encoding, ["capture", os.fsdecode(b"\xff \xce\x93 missing"), "-o", "x"])
    assert status == 2 and "missing cannot be read" in told and "Traceback" not in told


def test_a_process_whose_output_is_not_utf_8_ends_well():
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-m", "analysis", "--help"], env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr and b"Gamma" in done.stdout


def test_a_stream_that_is_not_there_or_no_text_stream_is_left_alone():
    any_encoding(None, io.StringIO())


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(monkeypatch):
    """It is raised, so that Python prints where it came from and ends with status 1; a user's is one line and 2."""
    from analysis.cli import runs

    for ours in (ValueError("shapes do not match"), TypeError("no"), ZeroDivisionError("by zero")):
        monkeypatch.setattr(runs, "_heads", lambda arguments, ours=ours: (_ for _ in ()).throw(ours))
        with pytest.raises(type(ours)):
            main(["heads", "run.safetensors"])


@pytest.mark.parametrize(
    "options,reason",
    [
        (["--keys", "0"], "at least one key"),
        (["--depths", "2"], "depth must be from 0 to 1"),
        (["--keeps", "1.5"], "keep_ratio must be from 0 to 1"),
        (["--skip-layers", "77"], "layers are 0 to 5"),
        (["--policies", "luck"], "policy must be one of"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_and_status_2(capsys, options, reason):
    assert main(["passkey", "-m", "books-5m", "--lengths", "120", "--depths", "0.5", "--keys", "1", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and reason in error
