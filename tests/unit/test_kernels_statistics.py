"""Attention statistics by kernels, in Triton's interpreter, against all probabilities in float64."""

import pytest
import torch

from l2kv.kernels.statistics import attention_statistics
from tests.support.statistics_oracle import statistics_slowly

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


def queries_and_keys(n, group, head_dim, dtype=torch.float32):
    """Laid out as a model's projections give them out: heads within tokens."""
    torch.manual_seed(0)
    query = (2 * torch.randn(1, n, 2 * group, head_dim, dtype=dtype)).transpose(1, 2)
    return query, torch.randn(1, n, 2, head_dim, dtype=dtype).transpose(1, 2)


def compare(query, key, width, options):
    for got, expected in zip(
        attention_statistics(query, key, width=width, options=options),
        statistics_slowly(query, key, width, options),
        strict=True,
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n,width", [(1, 1), (37, 1), (131, 3), (150, 16), (301, 33), (256, 64), (300, 128), (300, 400)]
)
def test_bins_of_any_width_are_summed_up_whatever_the_length(n, width, dtype):
    compare(*queries_and_keys(n, group=3, head_dim=16, dtype=dtype), width, {})


@pytest.mark.parametrize("group,head_dim", [(1, 16), (4, 24), (3, 80), (2, 144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heads_share_keys_and_are_as_wide_as_they_like(group, head_dim, dtype):
    compare(*queries_and_keys(140, group, head_dim, dtype), 32, {"scaling": 0.5 / head_dim**0.5})


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"s_aux": 2.0}, {"softcap": 2.0, "s_aux": -1.0, "scaling": 0.3}])
def test_soft_caps_and_sinks_count(options):
    query, key = queries_and_keys(140, group=3, head_dim=16)
    if "s_aux" in options:
        options = options | {"s_aux": options["s_aux"] + torch.randn(6)}
    compare(query, key, 20, options)
    plain = attention_statistics(query, key, width=20, options={})[0]
    assert not torch.allclose(plain, attention_statistics(query, key, width=20, options=options)[0], atol=1e-2)


def test_two_runs_give_the_same_bits():
    query, key = queries_and_keys(140, group=3, head_dim=16, dtype=torch.float16)
    first, second = (attention_statistics(query, key, width=20, options={}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
