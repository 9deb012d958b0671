"""Registries, and the registry of policies."""

import ast
import dataclasses
import inspect

import pytest
import torch

from l2kv import POLICIES, CompressionSpec, Policy, Registry, SpecError, register_policy
from l2kv.layer import CompressedLayer


@pytest.fixture
def fruit():
    return Registry[int]("fruit", LookupError, {"apple": 1, "pear": 2})


def test_entries_are_found_in_the_order_in_which_they_came(fruit):
    assert fruit.register("fig", 3) == 3
    assert list(fruit.items()) == [("apple", 1), ("pear", 2), ("fig", 3)]
    fruit.remove("apple")
    assert "apple" not in fruit and len(fruit) == 2 and fruit.find("pear") == fruit["pear"] == 2


def test_a_name_is_registered_once(fruit):
    with pytest.raises(ValueError, match="the fruit 'pear' exists already"):
        fruit.register("pear", 4)


@pytest.mark.parametrize("name", ["a pear", "pear,fig", "pear-tree", "", "1st", 3])
def test_a_name_can_be_typed_in_a_list(fruit, name):
    with pytest.raises(ValueError, match="a fruit needs a name of letters, digits and underscores"):
        fruit.register(name, 4)
    assert list(fruit) == ["apple", "pear"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aple", "fruit must be one of apple, pear, got 'aple'. Did you mean 'apple'?"),
        ("zucchini", "fruit must be one of apple, pear, got 'zucchini'."),
        (["apple"], "fruit must be one of apple, pear, got ['apple']."),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_nearest(fruit, name, said):
    with pytest.raises(LookupError) as error:
        fruit.find(name)
    assert str(error.value) == said


def test_a_policy_that_is_registered_evicts():
    def middle(pairs):
        """Keep the tokens nearest to the fifth."""
        return -(pairs.positions - 4.0).abs()

    policy = register_policy("middle", middle, title="Around the fifth")
    try:
        assert POLICIES["middle"] is policy and policy.about == "Keep the tokens nearest to the fifth."
        layer = CompressedLayer(CompressionSpec(budget=3, policy="middle"), 0)
        layer.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
        layer.evict_now()
        assert [held.tolist() for held in layer.kept_positions()] == [[[3, 4, 5]]] * 2
        with pytest.raises(SpecError, match="Did you mean 'middle'"):
            CompressionSpec(policy="midle")
    finally:
        POLICIES.remove("middle")
    with pytest.raises(SpecError, match=r"policy must be one of low_norm, .*, got 'middle'"):
        CompressionSpec(policy="middle")


def test_a_policy_says_what_it_keeps():
    with pytest.raises(ValueError, match="Toy: give its function a docstring"):
        register_policy("toy", lambda pairs: pairs.positions, title="Toy")
    assert "toy" not in POLICIES


def test_a_policy_that_scores_pairs_as_they_arrive_cannot_need_attention():
    with pytest.raises(ValueError, match="give on_arrival=False"):
        register_policy("toy", lambda pairs: pairs.received, title="Toy", needs_received=True)
    assert "toy" not in POLICIES


def test_a_policy_is_registered_by_all_fields_that_it_has():
    asked = inspect.signature(register_policy).parameters
    fields = {field.name: field.default for field in dataclasses.fields(Policy)}
    assert {name: asked[name].default for name in fields} == {
        name: inspect.Parameter.empty if default is dataclasses.MISSING else default for name, default in fields.items()
    }
    assert asked.keys() - fields.keys() == {"name"}


def test_what_type_checkers_are_told_of_making_a_spec_has_its_fields_and_defaults():
    tree = ast.parse(inspect.getsource(CompressionSpec))
    (told,) = (node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [argument.arg for argument in told.args[1:]]
    defaults = map(ast.literal_eval, told.defaults)
    assert list(zip(names, defaults, strict=True)) == [(f.name, f.default) for f in dataclasses.fields(CompressionSpec)]
