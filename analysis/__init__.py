"""Text and numbers: load a model, capture a text, measure heads, choose what to keep. Draws nothing.

Names are imported on first use, so that reading a saved run does not wait for torch.
"""

from __future__ import annotations

from l2kv._lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
