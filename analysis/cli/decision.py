"""`verdict`: whether a compressed cache may replace the full one in a model, measured and judged by rules."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from analysis import defaults
from analysis.cli import options
from analysis.cli.inputs import loaded_model, texts_of
from analysis.cli.options import Compression, listed
from analysis.cli.output import row_of, shown, tell, wrote
from analysis.decision.checklist import Limits
from analysis.decision.evidence import Measurement, Sizes
from analysis.demo.presets import RESULT_FILES
from analysis.records import save
from analysis.workspace import Workspace


def verdict(
    compression: Compression,
    sizes: Sizes,
    limits: Limits,
    texts: Annotated[
        list[Path],
        typer.Argument(
            parser=Path, metavar="TEXTS", help="Text files or folders, half planned on; bundled by default."
        ),
    ] = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    strategies: Annotated[
        Sequence[str],
        listed(
            options.STRATEGIES, "Allocation strategies that the plan is chosen from; all that need no costs by default."
        ),
    ] = (),
    device: options.Device = None,
    workspace: Annotated[
        Path | None,
        typer.Option(parser=Path, help="Folder of what was measured, to add to and to continue; the app's by default."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("-o", "--out", parser=Path, help="Folder to write the results and the plan to as well."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Decide whether to ship a compressed cache: GO, GO WITH A PLAN, NO-GO, or NOT YET. The status is 0 in any case."""
    loaded = loaded_model(model, device)
    measurement = Measurement(
        loaded,
        compression.spec(loaded.config),
        Workspace(workspace),
        replace(sizes, samples=max(sizes.samples, limits.least_samples)),
        texts_of(texts) if texts else None,
        tuple(strategies),
    )
    print(measurement.estimate, file=sys.stderr)
    with shown("s", scale=True) as progress:
        found = measurement.run(progress=progress)
    if to:
        records: dict[str, object] = {"plan": found.plans[0], **{results.task: results for results in found.results}}
        for name, record in records.items():
            wrote(save(record, to / RESULT_FILES[name]))
    decision, speed = found.decide(measurement.spec, limits=limits), found.speed_of(measurement.spec)
    rows = [row_of(check, of="as set") for check in decision.checks]
    rows += [row_of(check, of="plan") for check in decision.plan_checks]
    tell(
        {"of": "", "asks": "", "status": "", "says": ""},
        rows,
        json=json,
        title=f"{loaded.name}, {measurement.estimate.context:,} tokens",
        answer=f"Speed: {speed}\n{decision}",
        model=loaded.name,
        spec=measurement.spec,
        plan=decision.plan,
        verdict=decision.answer,
        smallest=decision.smallest,
        speed=speed,
        limits=limits,
    )
