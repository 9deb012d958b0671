"""Policies as tests bend them."""

from contextlib import contextmanager
from dataclasses import replace

from l2kv import POLICIES, policy_files


@contextmanager
def rescored(name, score):
    """Within the block, the policy `name` scores by another function."""
    policy = POLICIES[name]
    entries = POLICIES._entries  # in place: the order of the registry is seen by other tests

    def scored(pairs):
        """Score as the test says."""
        return score(pairs)

    entries[name] = replace(policy, score=scored)
    try:
        yield
    finally:
        entries[name] = policy


@contextmanager
def forget_files():
    """After the block, forget the policies of files that were loaded in it."""
    before = list(POLICIES)
    try:
        yield
    finally:
        for name in set(POLICIES) - set(before):
            POLICIES.remove(name)
            policy_files._sources.pop(name)
