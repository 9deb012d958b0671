"""Errors of the library: an invalid compression, and a model that cannot be compressed."""

from __future__ import annotations


class SpecError(ValueError):
    """An invalid compression: a field is out of range or does not fit the model; the message says which."""


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be reached, or that caches no keys; the message says why."""
