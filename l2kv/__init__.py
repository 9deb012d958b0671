"""KV-cache compression by key norm for transformers models. See `CompressedCache` and `compressible`."""

from __future__ import annotations

from l2kv._lazy import lazy_names

_HOME = {
    "POLICIES": "policies",
    "CompressedCache": "cache",
    "CompressionSpec": "spec",
    "Pairs": "policies",
    "Policy": "policies",
    "SpecError": "spec",
    "UnsupportedModelError": "hooks",
    "attention_seam": "hooks",
    "cache_nbytes": "cache",
    "check_compressible": "cache",
    "compressible": "prepare",
    "l2_compress": "cache",
    "attention_probabilities": "probabilities",
    "q_filters": "calibration",
}
__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)
