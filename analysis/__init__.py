"""What a model does with a text, in numbers: loading, capturing, measuring, choosing layers. Draws nothing.

Names are imported when they are first used, so that reading a saved run does not wait for torch.
"""

from __future__ import annotations

from l2kv._lazy import lazy_names

_HOME = {
    "AllocationPlan": "plans.allocation",
    "AttentionLoss": "measures",
    "Capture": "captures",
    "CausalCheck": "plans.ablation",
    "Front": "plans.front",
    "LoadedModel": "models.load",
    "LossCurves": "plans.curves",
    "METRICS": "metrics",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "Plan": "plans.skip",
    "RecordError": "errors",
    "Saving": "plans.export",
    "Study": "studies",
    "TextError": "errors",
    "UserError": "errors",
    "alr": "metrics",
    "answer": "verdicts",
    "attention_loss": "measures",
    "by_query": "metrics",
    "capture": "recorder",
    "causal_check": "plans.ablation",
    "compare": "comparing",
    "correlation": "metrics",
    "curves_of": "plans.curves",
    "head_vectors": "paper.vectors",
    "kvpress_code": "plans.export",
    "library_code": "plans.export",
    "load_model": "models.load",
    "load_run": "captures",
    "load_study": "studies",
    "loss_curves": "plans.curves",
    "measure_front": "plans.front",
    "model_size": "models.sizes",
    "plan": "plans.allocation",
    "read_text": "texts.read",
    "reproduce": "paper.figures",
    "save_run": "captures",
    "savings": "plans.export",
    "skip_list": "plans.skip",
    "study": "studies",
    "study_of": "studies",
    "suggest_skip_layers": "plans.skip",
    "tokenize": "texts.tokens",
}
__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)
