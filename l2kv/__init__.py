"""KV cache compression by key norm for transformers models. See `CompressedCache` and `compressible`."""

from __future__ import annotations

from l2kv._lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
