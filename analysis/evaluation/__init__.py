"""Evaluation: what compression costs, by tasks."""
