"""Policies as tests bend them."""

from contextlib import contextmanager
from dataclasses import replace

from l2kv import POLICIES


@contextmanager
def rescored(name, score):
    """Within the block, the policy `name` scores by another function."""
    policy = POLICIES[name]
    POLICIES.remove(name)
    POLICIES.register(name, replace(policy, score=score))
    try:
        yield
    finally:
        POLICIES.remove(name)
        POLICIES.register(name, policy)
