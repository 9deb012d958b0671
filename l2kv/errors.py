"""What can be wrong with a request: a compression that cannot be, or a model that cannot be compressed."""

from __future__ import annotations


class SpecError(ValueError):
    """A compression that cannot be: a field is out of range or does not fit the model; the message says which."""


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be reached, or that caches no keys; the message says why."""
