"""What commands take, declared once: arguments, options, and the names that registries hold. Loads no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis import defaults, metrics
from analysis.errors import SettingsError, UserError
from analysis.lab import by_pairs_alone
from analysis.paper.experiments import EXPERIMENTS
from analysis.paper.figures import FIGURES as READ_OFF
from analysis.plans import ablation, strategies
from analysis.plans.skip import Plan, skip_list
from analysis.records import load
from l2kv import policies, policy_files
from l2kv.errors import SpecError
from l2kv.registry import Registry
from l2kv.spec import SCHEDULES, CompressionSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Named:
    """The names of a registry, as what an option takes; spaces, hyphens and underscores in them are one to users.

    Entries are looked up when a command runs or prints its help, so one that is registered later is a choice, too.
    """

    registry: Registry[Any]
    fits: Callable[[Any], bool] = lambda entry: True
    """entry -> whether it can be chosen in the command line."""
    lacks: str = ""
    """What the others need, in words."""

    def __call__(self, given: str) -> str:
        """Name of the entry that a user means. Raises BadParameter, with the nearest, where there is none."""
        offered = self._offered()
        for name in offered.values():
            if _typed(name) == _typed(given):
                return name
        if others := [name for name in self.registry if _typed(name) == _typed(given)]:
            raise typer.BadParameter(f"{others[0]} cannot be chosen here: it needs {self.lacks}")
        try:
            return Registry(self.registry.noun, SettingsError, offered).find(given)
        except SettingsError as error:
            raise typer.BadParameter(str(error)) from error

    def __str__(self) -> str:
        return f"One of {', '.join(self._offered())}."

    def _offered(self) -> dict[str, str]:
        """Names by how they are typed."""
        return {_shown(name): name for name, entry in self.registry.items() if self.fits(entry)}


@dataclass(frozen=True, slots=True)
class NamedPolicy(Named):
    """The names of policies, and FILE.py:FUNCTION, a score of the user's own: the file is run."""

    def __call__(self, given: str) -> str:
        """Name of the policy that a user means. Raises BadParameter as `Named`, and where a file is not fit."""
        if ".py:" not in given:
            return Named.__call__(self, given)
        try:
            return policy_files.load_policy(given)
        except SpecError as error:
            raise typer.BadParameter(str(error)) from error

    def __str__(self) -> str:
        return f"{Named.__str__(self)[:-1]}, or my.py:score, a function of your own; the file is run."


@dataclass(frozen=True, slots=True)
class Listed:
    """A list written with commas, "0.5,0.25", as what an option takes."""

    of: Callable[[str], Any]

    def __call__(self, given: str | Sequence[Any]) -> tuple[Any, ...]:
        """The values of the list, converted by `of`. Raises BadParameter."""
        if not isinstance(given, str):  # a default
            return tuple(given)
        try:
            values = tuple(self.of(word) for word in given.replace(",", " ").split())
        except ValueError:
            raise typer.BadParameter(f"must be a list such as 1,2,3, got {given!r}") from None
        if not values:
            raise typer.BadParameter("an empty list leaves nothing to do: give one at least")
        return values

    def __str__(self) -> str:
        return str(self.of).replace("One", "Any", 1) if isinstance(self.of, Named) else ""


def _shown(name: str) -> str:
    """A name as it can be typed."""
    return re.sub(r"[^\w.]+", "-", name)


def _typed(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def refuse(context: typer.Context, options: Iterable[str], why: str) -> None:
    """Refuse options that a user typed, by their parameters, where they would change nothing. Raises UserError."""
    sources = {name: context.get_parameter_source(name) for name in options}
    if typed := [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]:
        raise UserError(f"{why}: leave out {', '.join('--' + name.replace('_', '-') for name in typed)}.")


def listed(of: Callable[[str], Any], about: str, *names: str) -> Any:
    """The option of a list, by the names given, or else its parameter's."""
    return typer.Option(*names, parser=Listed(of), metavar="LIST", help=about)


def out(what: str, kind: str = "File") -> Any:
    """The option of the file to write, or of the folder."""
    return typer.Option("-o", "--out", parser=Path, help=f"{kind} to write, such as {what}.")


POLICIES = NamedPolicy(
    policies.POLICIES,
    lambda policy: not policy.needs_calibration,
    "what is measured on the model first: give --plan, or use the library (l2kv.q_filters)",
)
OF_PAIRS = NamedPolicy(policies.POLICIES, by_pairs_alone, "more than keys and values")
OF_ALR = Named(Registry("policy", SettingsError, {name: policies.POLICIES[name] for name in ablation.POLICIES}))
WHEN = Named(Registry("schedule", SettingsError, {name: name for name in SCHEDULES}))
METRICS, STRATEGIES = Named(metrics.METRICS), Named(strategies.STRATEGIES)
PROBES, PROBE = Named(Registry("probe", SettingsError, metrics.PROBES)), _shown(defaults.PROBE)
_PAPER = dict(sorted({**READ_OFF, **EXPERIMENTS}.items(), key=lambda each: (len(each[0]), each[0])))  # fig2, fig10
FIGURES = Named(Registry("figure", SettingsError, _PAPER))

# Of texts and models. What a parser takes is not checked to be UTF-8: names of files need not be.
Text = Annotated[str, typer.Argument(parser=str, help="Text file, or - for standard input.", metavar="TEXT")]
Texts = Annotated[
    list[Path],
    typer.Argument(parser=Path, metavar="TEXTS", help="Text files, or folders of .txt files; the bundled by default."),
]
Model = Annotated[
    str,
    typer.Option("-m", "--model", "--model-id", parser=str, help="Name (see `models`), folder, GGUF file or hub id."),
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; by default the GPU if there is one.")]
Excerpts = Annotated[int, typer.Option(help="Maximum number of excerpts, spread over the texts.")]
ExcerptTokens = Annotated[int, typer.Option("--tokens", help="Tokens per excerpt, limited to what the model accepts.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate.")]

# Of a compression.
KeepRatio = Annotated[float, typer.Option(help="Share of the tokens to keep.")]
KeepRatios = Annotated[
    Sequence[float],
    listed(float, "Keep ratios to compare, such as 0.5,0.25.", "--keep-ratios", "--keep-ratio"),
]
Policy = Annotated[str, typer.Option(parser=POLICIES, help="Which key/value pairs to keep.")]
PolicyOfPairs = Annotated[str, typer.Option(parser=OF_PAIRS, help="Which key/value pairs to keep.")]
PolicyOfAlr = Annotated[str, typer.Option(parser=OF_ALR, help="Which key/value pairs to keep.")]
Policies = Annotated[Sequence[str], listed(POLICIES, "Policies to compare.")]
PoliciesOfPairs = Annotated[Sequence[str], listed(OF_PAIRS, "Policies to compare with.")]
SkipLayers = Annotated[str, typer.Option(help="Layers to skip, such as 0,1.")]
ProtectFirst = Annotated[int, typer.Option(help="Number of first tokens that are never evicted.")]
ProtectLast = Annotated[int, typer.Option(help="Number of latest tokens that are never evicted.")]
KeyBits = Annotated[
    int | None, typer.Option(help="Bits per number of a stored key, 8 or 4.", show_default="the model's dtype")
]
ValueBits = Annotated[
    int | None, typer.Option(help="Bits per number of a stored value, 8 or 4.", show_default="the model's dtype")
]
KeyChannels = Annotated[float, typer.Option(help="Share of the channels of each key to store (ThinK keeps 0.6).")]
PlanFile = Annotated[
    Path | None, typer.Option(parser=Path, help="Saved plan to compress by, instead of the options above.")
]
Strategy = Annotated[str, typer.Option(parser=STRATEGIES, help="How to allocate the budget to layers and heads.")]
Strategies = Annotated[Sequence[str], listed(STRATEGIES, "Allocation strategies to compare; all by default.")]

# Of what is printed.
Probe = Annotated[str, typer.Option(parser=PROBES, help="Query whose attention to look at.")]
Metric = Annotated[str | None, typer.Option(parser=METRICS, help="Metric to show for each layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The options of a compression."""

    keep_ratio: KeepRatio = defaults.KEEP_RATIO
    policy: Policy = "low_norm"
    skip_layers: SkipLayers = ""
    protect_last: ProtectLast = defaults.RECENT_WINDOW
    key_bits: KeyBits = None
    value_bits: ValueBits = None
    key_channels: KeyChannels = 1.0

    def spec(self, config: PretrainedConfig) -> CompressionSpec:
        """The compression that was asked for, in the model of a config. Raises UserError, SpecError."""
        return CompressionSpec(
            keep_ratio=self.keep_ratio,
            policy=self.policy,
            skip_layers=skip_list(self.skip_layers, n_layers=config.num_hidden_layers),
            protect_last=self.protect_last,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            key_channels=self.key_channels,
        )


@dataclass(frozen=True, kw_only=True)
class CompressionOfPairs(Compression):
    """The options of a compression by a policy whose order has an ALR."""

    policy: PolicyOfPairs = "low_norm"


@dataclass(frozen=True, kw_only=True)
class CompressionOrPlan(Compression):
    """The options of a compression, or a plan instead of them."""

    plan: PlanFile = None

    def spec(self, config: PretrainedConfig) -> CompressionSpec:
        """As `Compression.spec`; that of the plan where there is one."""
        return load(Plan, self.plan).spec if self.plan else Compression.spec(self, config)

    def check(self, context: typer.Context) -> None:
        """Refuse options that a plan overrides, save for its own policy: that may be of a file. Raises UserError."""
        if self.plan:
            same = {"policy"} if load(Plan, self.plan).spec.policy == self.policy else set()
            overridden = (field.name for field in fields(Compression) if field.name not in same)
            refuse(context, overridden, "--plan says how to compress")
