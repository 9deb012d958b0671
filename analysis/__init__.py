"""What a model does with a text, in numbers: loading, capturing, measuring, choosing layers. Draws nothing.

Names are imported when they are first used, so that reading a saved run does not wait for torch.
"""

from __future__ import annotations

from l2kv._lazy import lazy_names

_HOME = {
    "AllocationPlan": "plans.planning",
    "AttentionLoss": "measures",
    "Capture": "run",
    "CausalCheck": "plans.causal",
    "Front": "plans.front",
    "LoadedModel": "models",
    "LossCurves": "plans.curves",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "Plan": "plans.skip",
    "RunFileError": "errors",
    "Saving": "plans.export",
    "Study": "study",
    "TextError": "errors",
    "UserError": "errors",
    "alr": "measures",
    "attention_loss": "measures",
    "by_query": "metrics",
    "capture": "capturing",
    "causal_check": "plans.causal",
    "compare_runs": "comparing",
    "compare_studies": "comparing",
    "correlation": "measures",
    "head_vectors": "paper.vectors",
    "instrument": "synthetic",
    "kvpress_code": "plans.export",
    "library_code": "plans.export",
    "load_model": "models",
    "load_run": "run",
    "load_study": "study",
    "loss_curves": "plans.curves",
    "measure_front": "plans.front",
    "model_size": "sizes",
    "plan": "plans.planning",
    "read_text": "texts",
    "reproduce": "paper.figures",
    "save_run": "run",
    "savings": "plans.export",
    "skip_list": "plans.skip",
    "suggest_skip_layers": "plans.skip",
    "tokenize": "tokens",
    "verdicts": "measures",
}
__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)
