"""`lm-eval`: lm-evaluation-harness with the model `l2kv`. Knows none of its options."""

from __future__ import annotations

import sys

import typer

from analysis.extras import needs


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, whose options it takes, with the model l2kv beside its own.

    An example: --model l2kv --model_args pretrained=smollm2,keep_ratio=0.5 --tasks arc_easy
    """
    with needs("eval"):
        from lm_eval.__main__ import cli_evaluate

        import analysis.evaluation.harness  # noqa: F401  # registers the model
    sys.argv = ["lm-eval", *context.args]  # it reads them there alone
    cli_evaluate()
