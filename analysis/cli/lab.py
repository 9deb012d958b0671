"""`lab`: a first answer on one policy, a researcher's own or another, beside those that are built in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis import defaults
from analysis import lab as measured
from analysis.cli import options
from analysis.cli.inputs import excerpts_of, loaded_model, texts_of
from analysis.cli.output import Form, Row, form_of, shown, tell
from analysis.evaluation.results import Results
from analysis.evaluation.tasks import TASKS
from analysis.metrics import PROBES
from analysis.statistics import few_documents_warning
from analysis.studies import Study, layer_means, median_gamma
from analysis.words import counted, span

_PREDICTION: dict[str, Form] = {"method": "", "MiB": ".2f", "change": "+.3f", "perplexity_ratio": ".3f", "front": ""}
_PASSKEY: dict[str, Form] = {"method": "", "MiB": ".2f", "samples": "d", "score": ".2f", "front": ""}


def lab(
    policy: Annotated[
        str,
        typer.Argument(parser=options.OF_PAIRS, metavar="POLICY", help="Policy to try: my.py:score, or one by name."),
    ],
    texts: Annotated[
        list[Path],
        typer.Argument(
            parser=Path, metavar="TEXTS", help="Text files, or folders of .txt files; the bundled texts by default."
        ),
    ] = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    policies: options.PoliciesOfPairs = measured.OTHERS,
    keep_ratios: options.KeepRatios = measured.KEEP_RATIOS,
    protect_last: options.ProtectLast = defaults.RECENT_WINDOW,
    excerpts: options.Excerpts = measured.EXCERPTS,
    probe: options.Probe = options.PROBE,
    device: options.Device = None,
    to: Annotated[
        Path | None,
        typer.Option("-o", "--out", parser=Path, help="Folder of results; those in it are not computed again."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Try a policy in a minute: agreement with attention, prediction and passkeys, each as it is measured."""
    documents = texts_of(texts)
    loaded = loaded_model(model, device)
    from analysis.evaluation.run import evaluate

    settings = measured.PREDICTION
    given = excerpts_of(loaded, documents, n_tokens=settings.n_tokens, at_most=excerpts)
    found: dict[str, Any] = {}

    def section(name: str, columns: Mapping[str, Form], rows: Sequence[Row], title: str, answer: str) -> None:
        found[name] = rows
        if not json:
            tell(columns, rows, json=False, title=title, answer=f"{answer}\n")

    names = tuple(dict.fromkeys((policy, *policies)))
    with shown("text") as progress:
        agreed = measured.studies_by_policy(loaded, given, names, probe=probe, progress=progress)
    section(
        "agreement",
        {"layer": "d"} | {f"{_SHORT[metric]} {name}": form_of(metric) for metric in _SHORT for name in names},
        _by_layer(agreed, probe),
        f"{loaded.name}, agreement of scores with attention: means over heads and {counted(len(given), 'text')} of "
        f"{span(agreed[policy].n_tokens.tolist())} tokens; {probe}: {PROBES[probe]}\n"
        "Γ: −1 where the pairs of highest score get the most attention, 0 at chance; ALR/n: 0 is ideal",
        "\n".join(f"median Γ over heads, {name}: {median_gamma(study, probe=probe)}" for name, study in agreed.items()),
    )
    methods = measured.methods(names, keep_ratios, protect_last=protect_last)
    for task, asked, columns in (("lm", settings, _PREDICTION), ("passkey", measured.PASSKEYS, _PASSKEY)):
        with shown("sample") as progress:
            results = evaluate(
                loaded,
                task,
                methods,
                texts=given if task == "lm" else None,
                settings=asked,
                out=to and to / f"{task}.jsonl",
                progress=progress,
            )
        for note in results.notes:
            print(f"note: {note}", file=sys.stderr)
        front = measured.on_front(results)
        rows = [row | {"front": "yes" * (row["method"] in front)} for row in results.summary(TASKS[task])]
        title = f"{TASKS[task].title}, {TASKS[task].unit}: {counted(len(results.samples), 'sample')}, the last "
        title += f"{counted(protect_last, 'token')} protected; front: on the Pareto front, by bytes and score"
        section(task, columns, rows, title, "\n".join(_said(results, policy, policies, keep_ratios)))
    if json:
        tell({}, [], json=True, model=loaded.name, policy=policy, **found)


_SHORT = {"gamma": "Γ", "alr_per_token": "ALR/n"}


def _by_layer(agreed: Mapping[str, Study], probe: str) -> list[dict[str, Any]]:
    """A row for each layer: means over heads and texts, for each policy."""
    means = {
        f"{short} {name}": layer_means(study, metric, probe=probe).mean.tolist()
        for metric, short in _SHORT.items()
        for name, study in agreed.items()
    }
    layers = range(len(next(iter(means.values()))))
    return [{"layer": layer} | {name: of_layers[layer] for name, of_layers in means.items()} for layer in layers]


def _said(results: Results, policy: str, others: Sequence[str], keep_ratios: Sequence[float]) -> Iterator[str]:
    """What the scores of a policy say beside those of others at the same keep ratio, on the same samples."""
    if results.task == "passkey":
        if not results.scores(results.full).any():
            yield "The full cache finds no passkey, so the other rows say nothing."
        return
    for keep in keep_ratios:
        own = results.scores(f"{policy} {keep:g}")
        less = {other: results.interval(own - results.scores(f"{other} {keep:g}")) for other in others}
        told = "; ".join(f"{other} {one}" for other, one in less.items() if other != policy)
        yield f"keep ratio {keep:g}, NLL of {policy} less that of {told}"
    if warning := few_documents_warning(results.documents):
        yield warning
