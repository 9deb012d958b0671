"""What a model does with a text, in numbers: loading, capturing, measuring, choosing layers. Draws nothing.

Names are imported when they are first used, so that reading a saved run does not wait for torch.
"""

from __future__ import annotations

from l2kv._lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
