"""Settings as options of a command: every kind of type, and what cannot be one."""

import inspect
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import typer

from analysis.cli import evaluation
from analysis.cli.options import POLICIES, refuse
from analysis.cli.program import program, run
from analysis.evaluation.task import RESERVED, Task
from l2kv import policies
from l2kv.registry import Registry

FRUIT = Registry[int]("fruit", ValueError, {"apple": 1, "blood_orange": 2})


@dataclass(frozen=True)
class Kinds:
    """A setting of each kind."""

    number: Annotated[int, "A number."] = 3
    share: float = 0.5
    flag: bool = False
    word: Annotated[str | None, "A word."] = None
    most: int | None = None
    mode: Annotated[Literal["fast", "slow"], "A mode."] = "fast"
    modes: tuple[Literal["fast", "slow"], ...] = ("slow",)
    fruit: Annotated[str, "A fruit.", FRUIT] = "apple"
    fruits: Annotated[tuple[str, ...], "Fruits.", FRUIT] = ("apple",)
    perhaps: Annotated[str | None, "A fruit or none.", FRUIT] = None
    sizes: Annotated[tuple[int, ...], "Sizes."] = field(default_factory=lambda: (1, 2))


@pytest.fixture
def settings():
    """A program whose command takes settings: words -> exit status and the settings that the command got."""

    def given(*words: str):
        got = []

        def command(settings: Kinds) -> None:
            """Take settings."""
            got.append(settings)

        return run(program(command), words, name="it"), *got

    return given


def test_what_is_not_given_is_at_its_default(settings):
    assert settings() == (0, Kinds())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--number", "-4", "--share", "0.25", "--flag"], Kinds(number=-4, share=0.25, flag=True)),
        (["--word", "a,b c", "--most", "7"], Kinds(word="a,b c", most=7)),
        (["--mode", "slow", "--modes", "fast,slow"], Kinds(mode="slow", modes=("fast", "slow"))),
        (["--fruit", "blood-orange", "--fruits", "apple,Blood_Orange"],
         Kinds(fruit="blood_orange", fruits=("apple", "blood_orange"))),
        (["--perhaps", "apple", "--sizes", "5"], Kinds(perhaps="apple", sizes=(5,))),
    ],
)  # fmt: skip
def test_a_setting_of_each_kind_is_read_by_its_type(settings, words, expected):
    assert settings(*words) == (0, expected)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--mode", "slo"], "must be one of fast, slow, got 'slo'. Did you mean 'slow'?"),
        (["--modes", "fast,quick"], "must be one of fast, slow, got 'quick'"),
        (["--fruit", "pear"], "fruit must be one of apple, blood_orange, got 'pear'"),
        (["--most", "many"], "should be a valid integer"),
        (["--sizes", "1,x"], "must be a list such as 1,2,3, got '1,x'"),
        (["--sizes", ""], "an empty list"),
        (["--modes", " , "], "an empty list"),
    ],
)
def test_what_is_of_another_type_is_one_line_and_status_2(settings, capsys, words, reason):
    assert settings(*words) == (2,)
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_help_says_of_each_setting_what_it_is_and_its_default(settings, capsys):
    assert settings("--help") == (0,)
    told = " ".join(capsys.readouterr().out.split())
    assert "A number. [default: 3]" in told and "Sizes. [default: 1, 2]" in told and "MISSING" not in told
    assert "A mode. One of fast, slow. [default: fast]" in told
    assert "Fruits. Any of apple, blood_orange. [default: apple]" in told


# What a task cannot ask for


def task(settings: type) -> Task:
    return Task("A toy", "Play.", "share", True, lambda *_: (), settings)


@pytest.mark.parametrize("name", ["model", "plan", "help", "out"])
def test_no_setting_of_a_task_has_the_name_of_another_option(name):
    kind = dataclass(type("Settings", (), {"__annotations__": {name: int}, name: 1}))
    with pytest.raises(ValueError, match=f"no setting may be called '{name}'"):
        task(kind)


def test_the_names_that_settings_cannot_have_are_those_of_the_command():
    assert (
        set(inspect.signature(evaluation._evaluate).parameters) | {"help", "keep_ratio", "out", "output_dir"}
        == RESERVED
    )


def test_a_setting_without_a_default_is_refused():
    @dataclass
    class Settings:
        rounds: int

    with pytest.raises(ValueError, match="'rounds' needs a default"):
        task(Settings)


# What says nothing


def test_options_that_would_change_nothing_are_refused_if_they_were_typed(capsys):
    def command(context: typer.Context, file: str = "", keep_ratio: float = 0.5, policy: str = "low_norm") -> None:
        """Take a file, or options."""
        if file:
            refuse(context, ("keep_ratio", "policy"), "the file says how")

    for words in ([], ["--keep-ratio", "0.5"], ["--file", "x"]):
        assert run(program(command), words, name="it") == 0
    words = ["--file", "x", "--policy", "low_norm", "--keep-ratio", "0.5"]  # the defaults, but typed
    assert run(program(command), words, name="it") == 2
    assert capsys.readouterr().err == "error: the file says how: leave out --keep-ratio, --policy.\n"


def test_a_policy_that_needs_calibration_is_not_offered():
    needy = [name for name, policy in policies.POLICIES.items() if policy.needs_calibration]
    assert {"signed_norm", "q_filters"} <= set(needy) and not any(name in str(POLICIES) for name in needy)
    for name in (*needy, "Q-Filters", "signed norm"):
        with pytest.raises(typer.BadParameter, match="cannot be chosen here: it needs what is measured on the model"):
            POLICIES(name)
