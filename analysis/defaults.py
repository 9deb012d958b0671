"""Defaults of settings, in one place: the library's functions, the command line and the app read them here.

The paper's own defaults are those of `l2kv.CompressionSpec`: nothing is protected there.
"""

from __future__ import annotations

KEEP_RATIO = 0.5
"""Share of the tokens seen that a head keeps."""
RECENT_WINDOW = 32
"""Latest tokens that are never evicted (`protect_last`).

Measured on SmolLM2 at half the cache (docs/results.md): fewer cost prediction, and more cost what was said earlier. It
is the largest of 8, 32 and 128 with which all passkeys of 400 tokens were found.
"""
SKIP_LAYERS: tuple[int, ...] = ()
"""Layers that are not compressed. In the same measurement skipping the paper's 0 and 1, which takes 7 % more bytes,
changed prediction by 0.01 nats/token, less than its standard error."""
STUDY_EXCERPTS = 24
"""Texts of a study at most. With fewer its intervals are too narrow (see `analysis.statistics`)."""
EXCERPT_TOKENS = 512
"""Tokens of each text of a study."""
EXCERPTS = 16
"""Texts that predictions are measured on: each is read once by every method."""
PROMPT_TOKENS = 384
"""Tokens of each of those that are compressed."""
NEW_TOKENS = 64
"""Tokens after the prompt that are predicted."""
GENERATED_TOKENS = 64
"""Most tokens that are generated after a prompt."""
KEEP_RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)
"""Budgets that allocation strategies are compared at."""
MODEL = "smollm2"
"""The model that is loaded where none is named."""
PROBE = "next token"
"""Whose attention is looked at, one of `analysis.metrics.PROBES`."""
