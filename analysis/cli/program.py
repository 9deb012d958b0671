"""From arguments to an exit status: functions become commands, and their mistakes are told. Knows no command."""

from __future__ import annotations

import codecs
import inspect
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, is_dataclass
from io import TextIOWrapper
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand
from typer.main import get_command

from analysis.cli.options import Listed, Named, listed
from analysis.errors import UserError
from analysis.evaluation.settings import Setting, settings_of
from l2kv.errors import SpecError

# What is printed that not every encoding has, in letters that all have.
_IN_ASCII = {
    "Γ": "Gamma", "Δ": "Delta", "ρ": "rho", "σ": "sigma", "α": "alpha", "±": "+-", "≥": ">=", "≤": "<=", "≈": "~",
    "×": "x", "÷": "/", "√": "sqrt", "→": "->", "−": "-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"',
    "‘": "'", "’": "'", "·": "*", "\u00a0": " ", "\u202f": " ",
}  # fmt: skip


class Command(TyperCommand):
    """A command whose help lists the names that its options take, as the registries hold them at that moment."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the names as they are now."""
        for parameter in self.params:
            parser = parameter.type_descriptor.parameter_info.parser  # type: ignore[attr-defined]
            if names := str(parser) if isinstance(parser, (Named, Listed)) else "":
                parameter.help = f"{parameter.type_descriptor.parameter_info.help} {names}"  # type: ignore[attr-defined]
            if isinstance(parser, Listed):
                parameter.display_type = lambda _: "LIST"  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def program(*commands: Callable[..., None]) -> typer.Typer:
    """One program of several commands, each a function whose parameters are its options."""
    made = typer.Typer(
        help="Does a low key norm predict attention in this model? Measure it, and compress the KV cache by it.",
        add_completion=False,
        rich_markup_mode=None,  # its frames are not in every encoding
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    for command in commands:
        made.command(cls=Command)(spread(command))
    return made


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"l2kv {version('l2kv')}")
        except PackageNotFoundError:
            typer.echo("l2kv, not installed as a package")
        raise typer.Exit


def with_version(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options of the program itself."""


def spread(function: Callable[..., None], *, omit: Collection[str] = (), **kinds: type) -> Callable[..., None]:
    """The function with a parameter for each option, where it has one for a dataclass of settings.

    Args:
        omit: parameters to leave at their defaults.
        kinds: dataclasses of settings, of the parameters whose annotation does not say which.
    """
    options: list[inspect.Parameter] = []
    settings: dict[str, type] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = kinds.get(parameter.name, parameter.annotation)
        if isinstance(kind, type) and is_dataclass(kind):
            settings[parameter.name] = kind
            options += [
                parameter.replace(name=setting.name, default=setting.default, annotation=_option(setting))
                for setting in settings_of(kind)
            ]
        elif parameter.name not in omit:
            options.append(parameter)

    def command(**given: Any) -> None:
        for name, kind in settings.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        function(**given)

    command.__name__, command.__doc__ = getattr(function, "__name__", ""), function.__doc__
    command.__annotations__ = {}  # typer would find `given` there
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    )
    return command


def _option(setting: Setting) -> Any:
    """The option of a setting: a number, a word, a name of a registry, or several with commas."""
    if setting.own is not None:
        return setting.own
    parser = setting.kind if setting.choices is None else Named(setting.choices)
    if setting.several:
        return Annotated[Sequence[Any], listed(parser, setting.about)]
    if isinstance(parser, Named):
        return Annotated[str, typer.Option(parser=parser, help=setting.about)]
    return Annotated[setting.kind, typer.Option(help=setting.about)]


def run(commands: typer.Typer, argv: Sequence[str] | None = None, *, name: str) -> int:
    """Run the command that the arguments name, and return the exit status.

    A user's mistake is one line on standard error and status 2; Ctrl-C is 130. A mistake of ours is not caught: a
    traceback, and Python's status 1.
    """
    any_encoding(sys.stdout, sys.stderr)
    try:
        status = get_command(commands).main(argv, prog_name=name, standalone_mode=False) or 0
        sys.stdout.flush()
    except (UserError, SpecError, typer.TyperException) as error:
        told = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"error: {told}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough; what Python flushes at its end must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if status == 130:
        print("cancelled", file=sys.stderr)
    return int(status)


def any_encoding(*streams: TextIO | None) -> None:
    """Let streams print what their encoding lacks in other letters, or as "?", in place of raising.

    Standard output is not UTF-8 where it is redirected on Windows, nor in containers without a locale.
    """
    codecs.register_error("l2kv", _in_other_letters)
    for stream in streams:
        if isinstance(stream, TextIOWrapper):  # None where there is no console, and anything in a test
            stream.reconfigure(errors="l2kv")


def _in_other_letters(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end
