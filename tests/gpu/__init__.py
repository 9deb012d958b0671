"""Checks that need a GPU: tests with the marker `gpu`, and `check` and `bench`, which measure."""
