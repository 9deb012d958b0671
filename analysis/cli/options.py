"""What commands take, declared once: arguments, options, and the names that registries hold. Loads no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.errors import SettingsError
from l2kv.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from l2kv.spec import CompressionSpec


@dataclass(frozen=True, slots=True)
class Named:
    """The names of a registry, as what an option takes; spaces, hyphens and underscores in them are one to users.

    Entries are looked up when a command runs or tells its help, so one that is registered later is a choice, too.
    """

    registry: Callable[[], Mapping[str, Any]]
    noun: str

    def __call__(self, given: str) -> str:
        """Name of the entry that a user means. Raises BadParameter, with the nearest, where there is none."""
        entries = self.registry()
        for name in entries:
            if _typed(name) == _typed(given):
                return name
        try:
            return Registry(self.noun, SettingsError, {_shown(name): name for name in entries}).find(given)
        except SettingsError as error:
            raise typer.BadParameter(str(error)) from error

    def __str__(self) -> str:
        return f"One of {', '.join(map(_shown, self.registry()))}."


@dataclass(frozen=True, slots=True)
class Listed:
    """A list written with commas, "0.5,0.25", as what an option takes."""

    of: Callable[[str], Any]

    def __call__(self, given: str | Sequence[Any]) -> tuple[Any, ...]:
        """The values of the list, converted by `of`. Raises BadParameter."""
        if not isinstance(given, str):  # a default
            return tuple(given)
        try:
            return tuple(self.of(word) for word in given.replace(",", " ").split())
        except ValueError:
            raise typer.BadParameter(f"must be a list such as 1,2,3, got {given!r}") from None

    def __str__(self) -> str:
        return str(self.of).replace("One", "Any", 1) if isinstance(self.of, Named) else ""


def _shown(name: str) -> str:
    """A name as it can be typed."""
    return re.sub(r"[^\w.]+", "-", name)


def _typed(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def _entries(module: str, name: str) -> Callable[[], Mapping[str, Any]]:
    """What holds the names, imported when it is asked for."""
    return lambda: getattr(import_module(module), name)


POLICIES = Named(_entries("l2kv.policies", "POLICIES"), "policy")
METRICS = Named(_entries("analysis.metrics", "METRICS"), "metric")
PROBES = Named(_entries("analysis.metrics", "PROBES"), "probe")
STRATEGIES = Named(_entries("analysis.plans.strategies", "STRATEGIES"), "strategy")
FIGURES = Named(_entries("analysis.paper.figures", "FIGURES"), "figure")

# Of texts and models. What a parser takes is not checked to be UTF-8: names of files need not be.
Text = Annotated[str, typer.Argument(parser=str, help="A text file, or - for standard input.", metavar="TEXT")]
Texts = Annotated[
    list[Path], typer.Argument(parser=Path, help="Text files, or folders of .txt files.", metavar="TEXTS")
]
Model = Annotated[
    str, typer.Option("-m", "--model", parser=str, help="A name (see `models`), a folder, a GGUF file or a hub id.")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU where there is one.")]
Excerpts = Annotated[int, typer.Option(help="Excerpts at most, spread over the texts.")]
ExcerptTokens = Annotated[int, typer.Option("--tokens", help="Tokens of each excerpt, or as many as the model takes.")]
PromptTokens = Annotated[int, typer.Option(help="Tokens of each excerpt that are compressed.")]
NewTokens = Annotated[int, typer.Option(help="Tokens after them that are predicted.")]

# Of a compression.
KeepRatio = Annotated[float, typer.Option(help="Share of the tokens that is kept.")]
KeepRatios = Annotated[Sequence[float], typer.Option(parser=Listed(float), metavar="LIST", help="Budgets: 0.5,0.25.")]
Policy = Annotated[str, typer.Option(parser=POLICIES, help="What is kept.")]
Policies = Annotated[
    Sequence[str], typer.Option(parser=Listed(POLICIES), metavar="LIST", help="Several of what is kept.")
]
SkipLayers = Annotated[str, typer.Option(help="Layers that are not compressed: 0,1.")]
ProtectLast = Annotated[int, typer.Option(help="Latest tokens that are never evicted.")]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", parser=Path, help="A plan's file, in place of all other options of the compression."),
]

# Of what is told.
Probe = Annotated[str, typer.Option(parser=PROBES, help="Whose attention.")]
Metric = Annotated[str | None, typer.Option(parser=METRICS, help="A metric to tell of each layer.")]
Strategies = Annotated[
    Sequence[str], typer.Option(parser=Listed(STRATEGIES), metavar="LIST", help="Which strategies; all by default.")
]
Strategy = Annotated[str, typer.Option(parser=STRATEGIES, help="How the budget is allocated to layers and heads.")]
Lengths = Annotated[
    Sequence[int], typer.Option(parser=Listed(int), metavar="LIST", help="Numbers of tokens: 400,1000.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def out(what: str) -> Any:
    """The option of the file to write."""
    return typer.Option("-o", "--out", parser=Path, help=f"The file to write, such as {what}.")


def spec_of(
    plan: Path | None, keep_ratio: float, policy: str, skip_layers: str, protect_last: int, *, config: PreTrainedConfig
) -> CompressionSpec:
    """The compression that was asked for, in the model of a config. Raises UserError, SpecError."""
    from analysis.plans.skip import Plan, skip_list
    from analysis.records import load
    from l2kv.spec import CompressionSpec

    if plan:
        return load(Plan, plan).spec
    skipped = skip_list(skip_layers, n_layers=config.num_hidden_layers)
    return CompressionSpec(keep_ratio=keep_ratio, policy=policy, skip_layers=skipped, protect_last=protect_last)
