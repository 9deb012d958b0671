"""KV-cache compression by key norm for transformers models. See `CompressedCache` and `compressible`."""

from l2kv.cache import CompressedCache, cache_nbytes, check_compressible, l2_compress
from l2kv.policies import POLICIES
from l2kv.prepare import compressible
from l2kv.seam import UnsupportedModelError, attention_seam
from l2kv.spec import CompressionSpec

__all__ = [
    "POLICIES",
    "CompressedCache",
    "CompressionSpec",
    "UnsupportedModelError",
    "attention_seam",
    "cache_nbytes",
    "check_compressible",
    "compressible",
    "l2_compress",
]
