"""`passkey`: is a number that was hidden in a long text still found after compression?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from analysis.cli.shared import add_device, add_model, counter
from analysis.cli.specs import loaded_model


def add(commands) -> None:
    """Add the command."""
    passkey = commands.add_parser("passkey", help="is a hidden number still found after compression? by length")
    add_model(passkey)
    passkey.add_argument("--lengths", type=int, nargs="+", default=[400, 1000, 2000], help="tokens of the prompts")
    passkey.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], help="where it is told")
    passkey.add_argument("--keys", type=int, default=4, help="numbers at each length and depth (4)")
    passkey.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.25], help="keep ratios (0.5 0.25)")
    passkey.add_argument(
        "--policies", nargs="+", default=["low_norm", "high_norm", "random", "streaming", "keydiff"], help="what stays"
    )
    passkey.add_argument("--skip-layers", default="0, 1", help='layers that are not compressed ("0, 1")')
    passkey.add_argument("--protect-last", type=int, default=32, help="latest tokens that are never evicted (32)")
    passkey.add_argument("-o", "--out", type=Path, help="a JSON file to write")
    add_device(passkey)
    passkey.set_defaults(run=_passkey)


def _passkey(arguments: argparse.Namespace) -> None:
    from analysis.plans.skip import skip_list

    loaded, count = loaded_model(arguments), counter()
    from analysis.evaluation.run import passkey_grid, passkeys
    from l2kv import CompressionSpec

    skipped = skip_list(arguments.skip_layers, n_layers=loaded.config.num_hidden_layers)
    specs: dict[str, CompressionSpec | None] = {"full cache": None}
    for keep in arguments.keeps:
        for policy in arguments.policies:
            specs[f"keep {keep:g}, {policy.replace('_', ' ')}"] = CompressionSpec(
                keep_ratio=keep, policy=policy, skip_layers=skipped, protect_last=arguments.protect_last
            )
    scores = passkey_grid(
        loaded,
        specs,
        lengths=arguments.lengths,
        depths=arguments.depths,
        keys=passkeys(arguments.keys),
        on_done=lambda done, total: count("answers", done, total),
    )
    found = {(name, length): [0, 0] for name in specs for length in arguments.lengths}
    for score in scores:
        found[score.spec, score.n_tokens][0] += score.found
        found[score.spec, score.n_tokens][1] += score.trials
    for length in sorted(set(arguments.lengths)):
        if not found["full cache", length][0]:
            print(
                f"note: of {length} tokens the full cache finds none, so the other rows say nothing.", file=sys.stderr
            )
        if length > loaded.positions:
            print(
                f"note: {loaded.name} was trained on {loaded.positions:,} tokens at once; {length:,} are more.",
                file=sys.stderr,
            )
    for line in _table(list(specs), arguments.lengths, found):
        print(line)
    print(
        f"{loaded.name}: passkeys found, with 95 % Wilson intervals; {len(arguments.depths)} depths, "
        f"{arguments.keys} keys each. The question comes after compression. Skipped layers: "
        f"{arguments.skip_layers or 'none'}; protected in every row: the last {arguments.protect_last} tokens."
    )
    if arguments.out:
        print(f"wrote {_write(arguments, loaded.name, specs, scores)}")


def _table(names: list[str], lengths: list[int], found: dict[tuple[str, int], list[int]]) -> Iterator[str]:
    """A Markdown table of found of trials."""
    from scipy.stats import binomtest

    yield "| cache | " + " | ".join(f"{length} tokens" for length in lengths) + " |"
    yield "|---" * (len(lengths) + 1) + "|"
    for name in names:
        cells = []
        for length in lengths:
            hits, trials = found[name, length]
            ends = binomtest(hits, trials).proportion_ci(method="wilson")
            cells.append(f"{hits} of {trials} ({ends.low:.0%} to {ends.high:.0%})")
        yield f"| {name} | " + " | ".join(cells) + " |"


def _write(arguments: argparse.Namespace, model: str, specs, scores) -> Path:
    import json
    from dataclasses import asdict

    from analysis.records import write_text

    content = {
        "model": model,
        "specs": {name: spec and asdict(spec) for name, spec in specs.items()},
        "scores": [asdict(score) for score in scores],
    }
    return write_text(json.dumps(content, indent=1) + "\n", arguments.out)
