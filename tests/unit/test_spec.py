"""How many pairs a spec keeps, and which specs are refused."""

import pytest

from l2kv import CompressionSpec
from l2kv.spec import Target


@pytest.mark.parametrize(
    "ratio,seen,kept", [(0.55, 100, 55), (0.1 + 0.2, 1000, 300), (0.7, 30, 21), (0.5, 7, 4), (0.001, 5, 1), (0.0, 9, 0)]
)
def test_a_ratio_of_a_count_is_rounded_up_in_decimals(ratio, seen, kept):
    assert CompressionSpec(keep_ratio=ratio).kept(seen, seen, Target(ratio)) == kept


def test_a_cache_shorter_than_prune_after_is_left_alone():
    spec = CompressionSpec(keep_ratio=0.5, prune_after=10)
    assert [spec.kept(n, n, Target(0.5)) for n in (9, 10, 11)] == [9, 5, 6]


@pytest.mark.parametrize(
    "field,value,error",
    [
        ("keep_ratio", 1.5, ValueError),
        ("keep_ratio", float("nan"), ValueError),
        ("keep_ratio", "half", TypeError),
        ("prune_after", -1, ValueError),
        ("protect_last", 2.5, TypeError),
        ("skip_layers", 3, TypeError),
        ("skip_layers", (-1,), ValueError),
        ("policy", "lowest", ValueError),
    ],
)
def test_a_bad_spec_is_refused_by_name_and_value(field, value, error):
    with pytest.raises(error, match=field if field != "skip_layers" else "skip_layers") as caught:
        CompressionSpec(**{field: value})
    assert repr(value).strip("(),") in str(caught.value)
