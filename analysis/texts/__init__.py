"""Texts: read, tokenized, and cut into excerpts."""
