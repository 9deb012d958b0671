"""What a model does with a text, in numbers: loading, capturing, measuring, choosing layers. Draws nothing.

Names are imported when they are first used, so that reading a saved run does not wait for torch.
"""

from __future__ import annotations

from l2kv._lazy import lazy_names

_HOME = {
    "AttentionLoss": "measures",
    "Capture": "run",
    "LoadedModel": "models",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "Plan": "skip",
    "RunFileError": "errors",
    "TextError": "errors",
    "UserError": "errors",
    "alr": "measures",
    "attention_loss": "measures",
    "capture": "capturing",
    "correlation": "measures",
    "load_model": "models",
    "load_run": "run",
    "save_run": "run",
    "suggest_skip_layers": "skip",
    "tokenize": "tokens",
    "verdicts": "measures",
}
__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)
