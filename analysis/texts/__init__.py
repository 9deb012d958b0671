"""Texts: read them, tokenize them, cut them into excerpts."""
