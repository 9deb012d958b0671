"""What a model does with a text, in numbers: loading, capturing, measuring, choosing layers. Draws nothing.

Names are imported when they are first used, so that reading a saved run does not wait for torch.
"""

from __future__ import annotations

from l2kv._lazy import lazy_names

_HOME = {
    "AllocationPlan": "planning",
    "AttentionLoss": "measures",
    "Capture": "run",
    "CausalCheck": "causal",
    "Front": "front",
    "LoadedModel": "models",
    "LossCurves": "curves",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "Plan": "skip",
    "RunFileError": "errors",
    "Saving": "export",
    "Study": "study",
    "TextError": "errors",
    "UserError": "errors",
    "alr": "measures",
    "attention_loss": "measures",
    "by_query": "metrics",
    "capture": "capturing",
    "causal_check": "causal",
    "compare_runs": "comparing",
    "compare_studies": "comparing",
    "correlation": "measures",
    "head_vectors": "vectors",
    "instrument": "synthetic",
    "kvpress_code": "export",
    "library_code": "export",
    "load_model": "models",
    "load_run": "run",
    "load_study": "study",
    "loss_curves": "curves",
    "measure_front": "front",
    "model_size": "sizes",
    "plan": "planning",
    "reproduce": "paper",
    "save_run": "run",
    "savings": "export",
    "skip_list": "skip",
    "suggest_skip_layers": "skip",
    "tokenize": "tokens",
    "verdicts": "measures",
}
__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)
