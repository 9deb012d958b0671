"""Names of transformers that older versions lack: 5.17, which GPU images carry, knows no layer without a cache."""

from __future__ import annotations

try:
    from transformers.cache_utils import DummyLayer
except ImportError:

    class DummyLayer:  # type: ignore[no-redef]
        """Layer without a cache of its own, of which that version makes none."""


__all__ = ["DummyLayer"]
