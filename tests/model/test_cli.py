"""The command line, as a user types it."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pytest
from typer.main import get_command

from analysis import Plan
from analysis.captures import load_run
from analysis.cli import catalogue, measures
from analysis.cli.output import form_of, shown, tell
from analysis.cli.program import any_encoding
from analysis.evaluation.task import Sample, Scoring, Task
from analysis.evaluation.tasks import TASKS
from analysis.metrics import METRICS, metrics
from analysis.plans.curves import loss_curves
from analysis.plans.strategies import plan
from analysis.records import load, save
from analysis.statistics import Interval
from analysis.studies import save_study, study_of
from analysis.texts.tokens import tokenize
from app.cli import commands, main
from l2kv import CompressionSpec
from l2kv.policies import POLICIES
from tests.support.evaluation import ablation_of
from tests.support.paths import BUNDLED, ROOT
from tests.support.runs import random_run

TEXT = "The old man looked at the sea, and the sea looked at the old man, and neither of them said a word."

DEMO, STUDY = str(BUNDLED / "demo.safetensors"), str(BUNDLED / "study.safetensors")
COMMANDS = [command.name for command in get_command(commands()).commands.values()]


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


# Exit statuses of a real process


def process(*arguments: str, module: str = "app.cli", code: str = "", **options) -> subprocess.Popen:
    command = ["-c", code] if code else ["-m", module]
    command = [sys.executable, *command, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("module", ["app.cli", "analysis"])
@pytest.mark.parametrize("arguments", [["heads", "nowhere"], ["heads", "--probe", "x", DEMO], ["heads"], ["none"], []])
def test_a_users_mistake_ends_a_process_with_status_2_and_one_line(module, arguments):
    done = process(*arguments, module=module)
    told, error = done.communicate()
    assert done.returncode == 2 and not told
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_mistake_of_ours_ends_a_process_with_status_1_and_a_traceback():
    broken = "import sys, analysis.captures as c; c.load_run = lambda file: 1 / 0; from app.cli import main; "
    done = process("heads", DEMO, code=broken + "sys.exit(main())")
    told, error = done.communicate()
    assert done.returncode == 1 and not told
    assert error.startswith("Traceback (most recent call last)")
    assert error.endswith("ZeroDivisionError: division by zero\n")


def test_ctrl_c_ends_a_process_with_status_130():
    # A process that a shell runs in the background ignores the signal, and so would its children.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    waits = "import sys, time, analysis.captures as c; c.load_run = lambda _: print('on', flush=True) or time.sleep(60)"
    done = process("heads", DEMO, code=f"{heard}; {waits}; from app.cli import main; sys.exit(main())")
    assert done.stdout.readline() == "on\n"
    time.sleep(0.1)
    done.send_signal(signal.SIGINT)
    _, error = done.communicate(timeout=30)
    assert done.returncode == 130 and error.strip() == "cancelled"


def test_a_closed_pipe_is_quiet():
    done = process("heads", DEMO)
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait() == 1


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["report", "--help"], ["plan"], ["nothing"]])
def test_help_and_mistakes_wait_for_no_heavy_import(arguments):
    code = "import sys; from app.cli import main; status = main(); "
    done = process(*arguments, code=code + "print({'torch', 'transformers', 'streamlit', 'pandas'} & set(sys.modules))")
    told, _ = done.communicate()
    assert told.splitlines()[-1] == "set()"


# Names, tables, JSON and progress


def test_help_lists_what_registries_hold_when_it_is_asked_for(capsys):
    assert main(["savings", "--help"]) == 0
    assert "toy_policy" not in capsys.readouterr().out
    POLICIES.register("toy_policy", POLICIES["random"])
    try:
        assert main(["savings", "--help"]) == 0
        assert "toy_policy" in capsys.readouterr().out
        assert main(["savings", "books-5m", "--policy", "toy-policy", "--json"]) == 0  # hyphens are underscores here
        assert json.loads(capsys.readouterr().out)["spec"]["policy"] == "toy_policy"
    finally:
        POLICIES.remove("toy_policy")


def test_json_holds_the_numbers_of_the_table_with_all_their_digits(capsys):
    assert main(["heads", DEMO, "--json"]) == 0
    told, run = json.loads(capsys.readouterr().out), load_run(DEMO)
    assert told["model"] == "books-5m" and told["probe"] == "next token" and told["answer"].startswith("Does low norm")
    for name in ("gamma", "spearman", "alr_per_token", "sink_share"):
        expected = metrics(run).of(name)
        got = np.array([row[name] for row in told["rows"]], dtype=float).reshape(expected.shape)
        assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize(
    "arguments", [["models"], ["selftest"], ["savings", "books-5m"], ["skip", STUDY, "--count", "1"]]
)
def test_json_is_all_that_is_on_standard_output(capsys, arguments):
    assert main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"rows", "answer"}


def test_a_table_is_aligned_says_what_is_undefined_and_is_never_wrapped(capsys):
    rows = [
        {"name": "first", "value": 0.25, "over texts": Interval(1.0, 0.5, 1.5), "all": [1.0, 2.0]},
        {"name": "x" * 300, "value": float("nan"), "over texts": Interval(-1.0, np.nan, np.nan), "all": None},
    ]
    tell({"name": "", "value": ".2f", "over texts": "+.1f", "all": ".0f"}, rows, json=False, title="t", answer="a")
    title, head, first, second, answer = capsys.readouterr().out.splitlines()
    assert (title, answer) == ("t", "a")
    assert first.split() == ["first", "0.25", "+1.0", "[+0.5,", "+1.5]", "1", "2"]
    assert second.split() == ["x" * 300, "undefined", "-1.0"]
    for number, heading in (("0.25", "value"), ("[+0.5, +1.5]", "over texts"), ("undefined", "value")):
        line = second if number == "undefined" else first
        assert line.index(number) + len(number) == head.index(heading) + len(heading)  # numbers end below their heading
    tell({"name": ""}, rows, json=True, model="m")
    told = json.loads(capsys.readouterr().out)
    assert told["rows"][1]["value"] is None and told["rows"][0]["over texts"] == {"value": 1.0, "low": 0.5, "high": 1.5}


def test_columns_of_metrics_are_headed_by_their_titles_and_others_by_words(capsys):
    tell({"normalised_alr": form_of("normalised_alr"), "n_tokens": ",", "kv_head": "d"}, [ROW], json=False)
    head, row = capsys.readouterr().out.splitlines()
    assert re.split("  +", head) == [METRICS["normalised_alr"].title, "tokens", "kv head"]
    assert row.split() == ["0.500", "1,000", "3"]
    tell({}, [ROW], json=True)
    assert json.loads(capsys.readouterr().out)["rows"] == [ROW]  # programs read the names


ROW = {"normalised_alr": 0.5, "n_tokens": 1000, "kv_head": 3}


# Plans of a study: nothing is captured again


def test_a_plan_of_a_study_is_the_plan_of_its_captures(tmp_path, capsys):
    run = random_run()
    study = save_study(study_of(run, protect_last=4), tmp_path / "study.safetensors")
    options = ["--protect-last", "4", "--keep-ratio", "0.4"]
    assert main(["plan", str(study), *options, "-o", str(tmp_path / "plan.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = plan(loss_curves(run, protect_last=4), 0.4)
    assert [row["by_kv_head"] for row in told["rows"]] == expected.ratios.tolist()
    assert told["expected_loss"] == pytest.approx(expected.expected_loss, abs=1e-6)  # files hold float32
    assert load(Plan, tmp_path / "plan.json").spec == expected.to_spec() and told["model"] == run.model
    assert main(["plan", str(study), *options, "--strategy", "random"]) == 0
    assert "so its attention loss is not known; a Pareto front measures its NLL change" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,reason",
    [
        (["--strategy", "adakv"], "adakv looks at single tokens"),
        (["--strategy", "by_head_by_cost"], "by_head_by_cost needs the measured cost of each head"),
        (["--protect-last", "32"], "Give --protect-last 4, or the texts"),
        ([STUDY], "Give one study"),
    ],
)
def test_what_no_plan_can_be_made_of_a_study_for_is_one_line_that_says_what_to_give(tmp_path, capsys, options, reason):
    study = save_study(study_of(random_run(), protect_last=4), tmp_path / "study.safetensors")
    assert main(["plan", str(study), "--protect-last", "4", *options]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_an_old_study_without_curves_says_how_to_make_one_with_them(tmp_path, capsys):
    old = replace(study_of(random_run()), curves=None, curve_status=None, curve_gammas=None)
    assert main(["plan", str(save_study(old, tmp_path / "study.safetensors"))]) == 2
    assert "Make it again: l2kv study" in capsys.readouterr().err


# What is refused, in a line that says why


@pytest.fixture
def files(tmp_path):
    """Names of files -> their paths: a text, an ablation, a study with loss curves, and two plans of one name."""
    study = study_of(random_run(), protect_last=4)
    made = {
        "text": tmp_path / "text.txt",
        "ablation": save(ablation_of(np.array([[0.1, 0.2], [0.5, 0.4]])), tmp_path / "ablation.json"),
        "study": save_study(study, tmp_path / "study.safetensors"),
        "plan": save(Plan("m", CompressionSpec(), ""), tmp_path / "a" / "plan.json"),
        "other": save(Plan("m", CompressionSpec(0.25), ""), tmp_path / "b" / "plan.json"),
        "named": save(Plan("m", CompressionSpec(0.1), ""), tmp_path / "streaming 0.5.json"),
    }
    made["text"].write_text(TEXT)
    return {name: str(path) for name, path in made.items()}


ON_CPU = ["-m", "books-5m", "--device", "cpu"]
LITTLE = ["--no-baselines", *ON_CPU, "--policies", "streaming", "--keep-ratios", "0.5"]


@pytest.mark.parametrize(
    "words,reason",
    [
        ("skip {ablation} --keep-ratio 0.5", "ablation.json says how to compress: leave out --keep-ratio."),
        ("skip {ablation} --policy low_norm --protect-last 0", "leave out --policy, --protect-last."),
        ("skip {ablation} --threshold nan", "--threshold must be 0 or more, and finite, got nan"),
        ("skip {ablation} --threshold -1", "--threshold must be 0 or more, and finite, got -1"),
        ("skip {study} --policy random", "policy must be one of low_norm, high_norm, got 'random'"),
        ("ablation {text} --policy window -o x", "window cannot be chosen here: it needs more than keys and values"),
        ("savings books-5m --plan {plan} --keep-ratio 0.1", "--plan says how to compress: leave out --keep-ratio."),
        ("generate {text} --plan {plan} --policy random", "--plan says how to compress: leave out --policy."),
        ("plan {study} --model books-5m --excerpts 3", "study.safetensors has a model and texts of its own: leave out"),
        ("savings books-5m --policy q_filters", "q_filters cannot be chosen here: it needs what is measured"),
        ("evaluate passkey --strategies adakv --study {study} --protect-last 4", "adakv looks at single tokens"),
        ("front {text} --strategies '' -o x", "Invalid value for '--strategies': an empty list"),
        ("front {text} --keep-ratios ' , ' -o x", "--keep-ratio': an empty list"),
        ("evaluate passkey --lengths ''", "Invalid value for '--lengths': an empty list"),
        ("evaluate needle --lengths 200 --samples 0", "samples must be 1 or more, got 0"),
        ("evaluate lm --excerpts 3", "leave out --excerpts"),
        ("evaluate passkey --keep-ratios 0.5,0.50", "Two methods are called 'streaming 0.5'"),
        ("evaluate passkey --plan {plan} --plan {plan}", "Two methods are called '{plan}'"),
        ("evaluate passkey --plan '{named}'", "Two methods are called 'streaming 0.5'"),
        ("evaluate longbench", "give its path"),
    ],
)
def test_what_would_change_nothing_or_be_lost_is_refused(capsys, files, words, reason):
    words = shlex.split(words.format(**files))
    if words[0] == "evaluate":
        words = [*words[:2], *LITTLE, *words[2:]]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason.format(**files) in error and error.count("\n") == 1


def test_plans_of_one_name_and_ratios_that_look_alike_are_methods_of_their_own(capsys, files):
    plans = ["--plan", files["plan"], "--plan", files["other"]]
    options = [*LITTLE[:-1], "0.3333333,0.33333334", "--lengths", "120", "--depths", "0", "--keys", "1", "--json"]
    assert main(["evaluate", "passkey", *options, *plans]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    ratios = ["streaming 0.3333333", "streaming 0.33333334"]
    assert list(methods) == ["full cache", files["plan"], files["other"], *ratios]


def test_a_benchmark_is_summarised_by_its_axes_and_takes_texts(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("A quiet harbour. " * 400)
    options = [*LITTLE, "--lengths", "150,300", "--depths", "0,1", "--samples", "1", "--json"]
    assert main(["evaluate", "needle", str(tmp_path), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["n_tokens"], row["samples"]) for row in told["rows"]] == [
        (method, length, 2) for method in ("full cache", "streaming 0.5") for length in (150, 300)
    ]
    assert {row["depth"] for row in told["results"]} == {0, 1}
    assert main(["evaluate", "passkey", str(tmp_path), *LITTLE]) == 2
    assert "Got unexpected extra argument" in capsys.readouterr().err


def test_a_fetched_model_is_told_in_json_too(capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "fetch", lambda name, progress: (name, ROOT))
    assert main(["models", "some/model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"answer": ""} == {
        "name": "some/model", "folder": str(ROOT), "rows": [], "answer": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "missing,words,extra",
    [
        ("typer", ["heads", DEMO], "analysis"),
        ("msgspec", ["--help"], "analysis"),
        ("streamlit", ["app"], "app"),
        ("jinja2", ["report", DEMO, "-o", "x"], "app"),
        ("plotly", ["paper", "fig1", "README.md", "-o", "x"], "app"),
    ],
)
def test_without_an_extra_a_command_says_what_to_install(missing, words, extra):
    code = f"import sys; sys.modules[{missing!r}] = None; from app.console import main; sys.exit(main())"
    done = process(*words, code=code)
    told, error = done.communicate()
    needed = f"{missing} is not installed. Install what this command needs: pip install 'l2kv[{extra}]'"
    assert (done.returncode, told, error) == (2, "", f"error: {needed}\n")


def test_a_part_of_ours_that_is_missing_is_a_mistake_of_ours():
    code = "import sys; sys.modules['analysis.cli'] = None; from app.console import main; sys.exit(main())"
    done = process("--help", code=code)
    _, error = done.communicate()
    assert done.returncode == 1 and error.startswith("Traceback") and "analysis.cli" in error


# A task of one's own


@dataclass(frozen=True)
class Rounds:
    rounds: Annotated[int, "Rounds to play."] = 3


def test_a_task_that_is_registered_is_run_by_its_command(capsys):
    def build(loaded, settings, texts):
        ids = tokenize(loaded.tokenizer, TEXT).ids
        return [Sample(f"round {i}", ids[:-4], ids[-4:], answer="x", new_tokens=1) for i in range(settings.rounds)]

    scoring = Scoring(lambda sample, text: float(sample.name == "round 1"))
    TASKS.register("a_toy", Task("A toy", "Play.", "share", True, build, Rounds, scoring=scoring))
    try:
        options = ["-m", "books-5m", "--device", "cpu", "--rounds", "2", "--policies", "streaming", "--json"]
        assert main(["evaluate", "a-toy", *options, "--keep-ratios", "0.5", "--no-baselines"]) == 0
        told = json.loads(capsys.readouterr().out)
    finally:
        TASKS.remove("a_toy")
    assert told["task"] == "a_toy" and told["settings"] == {"rounds": 2} and len(told["results"]) == 4
    assert [row["score"]["value"] for row in told["rows"]] == [0.5, 0.5]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_to_who_looks_and_not_to_a_file(monkeypatch):
    for stream, looks in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown("pass") as progress:
            for done in (1, 1, 2):
                progress(done, 2, "passes")
                time.sleep(0.15)  # a bar is drawn ten times a second at most
            progress(1, 3, "answers")
        told = stream.getvalue()
        assert ("passes" in told and "2/2" in told and "pass/s" in told and "answers" in told) if looks else not told


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
    for words in ([], *([name] for name in COMMANDS)):
        status, told = printed(encoding, [*words, "--help"])
        assert status == 0 and "Usage: l2kv" in told and told.isascii()


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
    command = [sys.executable, "-m", "analysis", "heads", str(BUNDLED / "demo.safetensors")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr and b"Gamma" in done.stdout


def test_a_stream_that_is_not_there_or_no_text_stream_is_left_alone():
    any_encoding(None, io.StringIO())


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(monkeypatch):
    """It is raised, so that Python prints where it came from and ends with status 1; a user's is one line and 2."""
    for ours in (ValueError("shapes do not match"), TypeError("no"), ZeroDivisionError("by zero")):
        monkeypatch.setattr(measures, "tell", lambda *_, ours=ours, **__: (_ for _ in ()).throw(ours))
        with pytest.raises(type(ours)):
            main(["heads", DEMO])


@pytest.mark.parametrize(
    "options,reason",
    [
        (["--keys", "0"], "keys must be 1 or more, got 0"),
        (["--depths", "2"], "depths must be from 0 to 1, got 2"),
        (["--keep-ratios", "1.5"], "keep_ratio must be from 0 to 1"),
        (["--keep-ratios", "half"], "must be a list such as 1,2,3, got 'half'"),
        (["--skip-layers", "77"], "layers are 0 to 5"),
        (["--policies", "luck"], "policy must be one of"),
        (["--policies", "low_nrom"], "Did you mean 'low_norm'?"),
        (["--keys", "few"], "'--keys'"),
        (["--nothing"], "No such option: --nothing"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_and_status_2(capsys, options, reason):
    passkey = ["evaluate", "passkey", "-m", "books-5m", "--lengths", "120", "--depths", "0.5", "--keys", "1"]
    assert main([*passkey, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("l2kv")
